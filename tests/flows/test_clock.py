"""The clock is set while a chain or a server runs: nothing is computed twice, and every process is found again."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from flows import server
from tests.flows.test_two_pipelines import start
from tests.support import tiny
from tests.support.stage_drill import hashes

if TYPE_CHECKING:
    from tests.flows.conftest import Chain

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
JUMPS = ("+400d", "-3d", "-3650d", "+1h")


def test_a_process_is_found_after_the_clock_was_set(tmp_path, monkeypatch):
    """The kernel moves the time of boot when the clock is set, and psutil adds it to the start of each process."""
    (tmp_path / "infra").mkdir()
    (tmp_path / server.PROCFILE).write_text("server: sleep 600\n")
    process = server.start(tmp_path, server.SERVER, {"PORT": "1", "PATH": os.environ["PATH"]})
    try:
        before = psutil.Process(process.pid).create_time()
        boot = psutil.boot_time()
        monkeypatch.setattr(f"{psutil._psplatform.__name__}.boot_time", lambda: boot + 3600)
        assert psutil.Process(process.pid).create_time() > before + 3000, "psutil no longer moves with the clock"
        assert server.alive(process) and server.running(tmp_path) == {server.SERVER: process}
    finally:
        server.stop(tmp_path, process)
    assert not server.alive(process)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not LIBRARIES, reason="the package libfaketime is not installed")
def test_the_clock_jumps_while_the_chain_runs(tmp_path, chain: Chain):
    """Forwards and backwards by years at random moments; then the same command finds everything done."""
    tree = tiny.tree(tmp_path / "tree")
    clock = tmp_path / "clock"
    clock.write_text("+0")
    faked = {
        "LD_PRELOAD": str(LIBRARIES[0]),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # as with a real clock
        "NO_FAKE_STAT": "1",
    }
    chance = random.Random(15)
    process = start(tree, **faked)
    while process.poll() is None:
        time.sleep(chance.uniform(1, 10))
        clock.write_text(chance.choice(JUMPS))
    output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]
    assert hashes(tree) == hashes(chain.tree)
    again = [sys.executable, "-m", "dvc", "repro", "package"]
    done = subprocess.run(again, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0 and "Running stage" not in done.stdout, done.stdout
