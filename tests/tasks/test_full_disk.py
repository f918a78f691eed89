"""A full disk, in every stage and while a checkpoint is written: one sentence, and nothing half-written is kept."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.runtime import stage
from tests.support.stage_drill import STAGES

ROOT = Path(__file__).resolve().parents[2]
SAVE_TWICE = """
import sys
from pathlib import Path
import torch
from tasks.runtime import stage
from tests.support.stage_drill import STAGES
from tasks.training import checkpoint
def saved(folder: Path) -> None:
    for step in (1, 2):
        weights = {"model": {"weight": torch.zeros(SIZE)}}
        checkpoint.save(folder, checkpoint.Checkpoint(step, weights, [{"x" * EXTRA * (step - 1): 0.0}], {}))
stage.main(saved)
"""


def mount_on(disk: Path) -> str:
    """The command that mounts a small file system on the new folder `disk`; skips the test where that is refused."""
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=600k none {shlex.quote(str(disk))}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine does not allow users to mount a file system")
    return mount


@pytest.mark.parametrize(("size", "extra"), [(100_000, 0), (1000, 2_000_000)], ids=["weights", "history"])
def test_a_full_disk_while_a_checkpoint_is_saved_is_one_sentence(size, extra, tmp_path):
    """On a file system of 600 KB, which any user can mount in an own namespace."""
    disk = tmp_path / "disk"
    mount = mount_on(disk)
    script = SAVE_TWICE.replace("SIZE", str(size)).replace("EXTRA", str(extra))
    save = shlex.join([sys.executable, "-c", script, str(disk / "run")])
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{mount} && {save}; echo code $?; ls {shlex.quote(str(disk / 'run'))}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("saved: error: ") and "no space left on the device" in done.stderr
    assert done.stdout.splitlines()[1:] == ["code 1", "step-00000001"]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_stage_on_a_full_disk_is_one_sentence_and_a_rerun_completes_it(tmp_path, migrated_database, capsys):
    """Twice each, with a random amount of free space that is too little for the stage, or for DVC's cache."""
    disk = tmp_path / "disk"
    mount_on(disk)
    drill = [sys.executable, "-m", "tests.support.full_disk", str(disk), str(migrated_database)]
    seed = os.environ.get("AFTERIMAGE_DRILL_SEED") or "0"
    with capsys.disabled():
        done = subprocess.run(["unshare", "-rm", *drill, str(2 * len(STAGES)), seed], cwd=ROOT)
    assert done.returncode == 0


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("(sqlite3.OperationalError) database or disk is full"),
        shutil.Error([("from", "to", "[Errno 28] No space left on device: 'from' -> 'to'")]),
    ],
)
def test_a_full_disk_is_recognised_by_the_errors_of_each_library(error):
    assert stage.is_disk_full(error)
    assert not stage.is_disk_full(ValueError("something else"))
