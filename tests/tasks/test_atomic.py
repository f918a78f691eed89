"""Atomic writing: after an error or a kill the old file or folder is still complete."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tasks.runtime import atomic

ROOT = Path(__file__).parents[2]


def test_an_error_leaves_the_old_file(tmp_path):
    file = tmp_path / "file"
    atomic.write_text(file, "old")
    with pytest.raises(RuntimeError), atomic.writing(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "folder"
    for text in ("old", "new"):
        with atomic.writing_folder(folder) as temporary:
            (temporary / text).write_text(text)
    with pytest.raises(RuntimeError), atomic.writing_folder(folder) as temporary:
        (temporary / "half").write_text("half")
        raise RuntimeError
    assert os.listdir(folder) == ["new"]
    assert os.listdir(tmp_path) == ["folder"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    code = (
        "import os, signal, pathlib; from tasks.runtime import atomic\n"
        f"with atomic.writing_folder(pathlib.Path({str(tmp_path / 'folder')!r})) as folder:\n"
        "    (folder / 'half').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as killed:
        while (
            psutil.Process(killed.pid).status() != psutil.STATUS_ZOMBIE
        ):  # a zombie, because its parent has not waited for it
            time.sleep(0.01)
        assert [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
        with atomic.writing_folder(tmp_path / "folder") as temporary:
            (temporary / "whole").write_text("whole")
    assert killed.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(tmp_path / "folder") == ["whole"]


def test_temporary_files_of_a_running_process_are_kept(tmp_path):
    other = tmp_path / f".file.{os.getppid()}.tmp"
    other.write_text("being written")
    atomic.write_text(tmp_path / "file", "text")
    assert other.exists()


def test_equal_values_give_equal_bytes(tmp_path):
    atomic.write_json(tmp_path / "a", {"x": 1, "y": [2.5]})
    atomic.write_json(tmp_path / "b", {"y": [2.5], "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(tmp_path / "c", {"x": float("nan")})
    assert json.loads((tmp_path / "a").read_text()) == {"x": 1, "y": [2.5]}
    assert not (tmp_path / "c").exists()
