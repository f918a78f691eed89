"""What a killed DVC leaves is repaired, and what a running one uses is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows import recover
from tests.support import tiny


@pytest.fixture
def tree(tmp_path) -> Path:
    """A DVC work tree with one stage."""
    (tmp_path / "words").write_text("words")
    stage = "cmd: cp words made\n    deps: [words]\n    outs: [made]"
    (tmp_path / "dvc.yaml").write_text(f"stages:\n  make:\n    {stage}\n")
    (tmp_path / ".dvc" / "tmp").mkdir(parents=True)
    (tmp_path / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    tiny.git(tmp_path, "init", "--quiet")
    return tmp_path


def dvc(tree: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def block(tree: Path, pid: int) -> None:
    entry = {"pid": pid, "cmd": "dvc repro"}
    rwlock = {"write": {str(tree / "made"): entry}, "read": {str(tree / "other"): [entry]}}
    (tree / recover.ENTRIES).write_text(json.dumps(rwlock))


def test_an_entry_of_another_process_with_the_same_id_is_released(tree):
    """DVC itself would wait for it for ever."""
    with subprocess.Popen(["sleep", "60"], cwd="/") as unrelated:
        block(tree, unrelated.pid)
        done = subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=tree, capture_output=True, text=True)
        assert done.returncode != 0 and "is busy, it is being blocked by" in done.stderr
        assert recover.recover(tree) == [f"released the locks of processes that have ended: {unrelated.pid}"]
        assert "Running stage 'make'" in dvc(tree, "repro")
        unrelated.kill()


def test_the_entry_of_a_command_at_work_is_kept(tree):
    block(tree, os.getpid())
    before = (tree / recover.ENTRIES).read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tree)
        assert recover.recover(tree) == []
    assert (tree / recover.ENTRIES).read_bytes() == before
    assert recover.recover(tree), "outside of the work tree it is no command of it"


@pytest.mark.parametrize("text", ["", '{"write": {"a": {"pi', '{"write": {"a": {}}}', "[]"])
def test_a_list_of_locks_that_was_cut_off_is_removed(tree, text):
    (tree / recover.ENTRIES).write_text(text)
    assert recover.recover(tree) == [".dvc/tmp/rwlock was cut off by a kill, and is removed"]
    assert not (tree / recover.ENTRIES).exists() and recover.recover(tree) == []


@pytest.mark.parametrize("is_committed", [True, False])
def test_a_lock_file_that_was_cut_off_is_replaced_and_nothing_is_computed_again(tree, is_committed):
    dvc(tree, "repro")
    lock = tree / recover.LOCK
    whole = lock.read_bytes()
    if is_committed:
        tiny.git(tree, "add", "dvc.lock")
        tiny.git(tree, "commit", "--quiet", "-m", "results")
    lock.write_bytes(whole[: whole.index(b"cmd") + 2])
    became = "is replaced by the committed one" if is_committed else "is removed"
    assert recover.recover(tree) == [
        f"dvc.lock was cut off by a kill, and {became}; DVC takes the results from its cache"
    ]
    assert "Running stage" not in dvc(tree, "repro")
    assert lock.read_bytes() == whole


def test_a_lock_file_that_dvc_can_read_is_kept(tree):
    lock = tree / recover.LOCK
    before = b"schema: '2.0'\nstages:\n  make:\n    cmd: cp words made"  # no newline at its end
    lock.write_bytes(before)
    assert not recover.is_whole(before) and recover.recover(tree) == []
    assert lock.read_bytes() == before


def test_every_cut_that_counts_as_whole_can_be_read_by_dvc():
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA

    text = (tiny.ROOT / "dvc.lock").read_bytes()
    stages = yaml.safe_load(text)["stages"]
    short = yaml.safe_dump({"schema": "2.0", "stages": {"ingest": stages["ingest"]}}, sort_keys=False).encode()
    assert recover.is_whole(text) and recover.is_whole(short)
    whole = [short[:cut] for cut in range(1, len(short)) if recover.is_whole(short[:cut])]
    assert 0 < len(whole) < len(short) / 10
    for part in whole:
        COMPILED_LOCKFILE_SCHEMA(yaml.safe_load(part))


def test_a_folder_without_dvc_is_left(tmp_path):
    assert recover.recover(tmp_path) == []
