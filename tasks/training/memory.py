"""The process's memory: what training does with what it frees."""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # <malloc.h>
TOP_PAD_BYTES = 64 * 2**20


def keep_freed() -> None:
    """Have the C library keep freed memory for the next request instead of returning it to the kernel; idempotent.

    PyTorch caches no memory on a CPU. Each step's activations would be mapped, zeroed page by page and unmapped
    again, thousands of page faults a step and a tenth of its time. What the process holds stays as it is at its peak.
    Only glibc can be told; elsewhere nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    mallopt(MMAP_MAX, 0)
    mallopt(TRIM_THRESHOLD, -1)
    mallopt(TOP_PAD, TOP_PAD_BYTES)
