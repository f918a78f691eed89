"""Every stage is killed in turn; the same command then finishes the chain with the hashes of an undisturbed run."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.stage_drill import STAGES, environment, hashes


def repro(tree: Path, kill_in: str | None = None, after: float = 0.0) -> dict[str, float]:
    """Run `dvc repro`; kill -9 all its processes `after` seconds into the stage `kill_in`. Seconds of each stage."""
    log = tree.parent / "log"
    began: dict[str, float] = {}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", "repro"],
            cwd=tree,
            env=environment(),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while process.poll() is None:
            for stage in re.findall(r"Running stage '(\w+)'", log.read_text(encoding="utf-8", errors="replace")):
                began.setdefault(stage, time.monotonic())
            if kill_in in began and time.monotonic() > began[kill_in] + after:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                break
            time.sleep(0.02)
    assert process.returncode == (-signal.SIGKILL if kill_in else 0), log.read_text(errors="replace")[-3000:]
    ends = [*list(began.values())[1:], time.monotonic()]
    return {stage: end - start for (stage, start), end in zip(began.items(), ends, strict=True)}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_in_every_stage_the_chain_ends_in_the_same_hashes(tmp_path):
    undisturbed = tiny.tree(tmp_path / "undisturbed" / "tree")
    seconds = repro(undisturbed)
    killed = tmp_path / "killed" / "tree"
    shutil.copytree(
        undisturbed, killed, ignore=shutil.ignore_patterns("cache", "tmp", "mlflow.db*", "mlruns", ".scratch")
    )
    for made in ("data", "outputs", "reports"):
        shutil.rmtree(killed / made)
    (killed / "dvc.lock").unlink()
    moments = random.Random(0)
    for stage in STAGES:
        repro(killed, kill_in=stage, after=moments.uniform(0.05, 0.7) * seconds[stage])
    repro(killed)
    assert hashes(killed) == hashes(undisturbed)
    assert not [path for path in killed.rglob("*.tmp") if ".dvc" not in path.parts]
