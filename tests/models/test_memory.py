"""Freed memory stays with the process, so the next step allocates it without page faults."""

import json
import platform
import subprocess
import sys

import pytest

STEPS = """
import ctypes, json, resource
from models.device import keep_freed

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        blocks = [libc.malloc(size * 2**20) for size in (1, 8, 64)]
        for block, size in zip(blocks, (1, 8, 64)):
            libc.memset(block, 1, size * 2**20)
        for block in blocks:
            libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed("cuda")
faults()
returned = faults()
keep_freed("cpu")
keep_freed("cpu")
faults()
print(json.dumps([returned, faults()]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can keep freed memory")
def test_what_was_freed_is_used_again_without_page_faults():
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    returned, kept = json.loads(done.stdout)
    assert returned > 100 and kept < returned / 20
