"""One stage per GPU; lock files stand in for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flows import devices
from tasks.runtime.errors import StageError
from tests.support import tiny

TWO = {"CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b"}


@pytest.fixture(autouse=True)
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(devices, "LOCKS", tmp_path / "locks")
    monkeypatch.setattr(devices, "POLL_SECONDS", 0.01)
    return tmp_path / "locks"


def lent(environment: dict[str, str], said: list[str] | None = None, stop: threading.Event | None = None):
    return devices.lent(environment, (said if said is not None else []).append, stop or threading.Event())


def test_two_stages_get_different_gpus_and_a_third_waits_for_the_first_that_is_free() -> None:
    said: list[str] = []
    third: list[str] = []

    def work() -> None:
        with lent(TWO, said) as variables:
            third.append(variables["CUDA_VISIBLE_DEVICES"])

    with lent(TWO) as first:
        with lent(TWO) as second:
            assert [first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]] == ["GPU-a", "GPU-b"]
            thread = threading.Thread(target=work)
            thread.start()
            while not said:
                pass
            assert not third
        thread.join(10)
        assert third == ["GPU-b"]
    assert said == ["waiting for a GPU: other stages use GPU-a, GPU-b"]


def test_training_on_several_gpus_takes_all() -> None:
    stop = threading.Event()
    stop.set()
    with lent(TWO | {"AFTERIMAGE_ACCELERATE": "multi_gpu.yaml"}) as variables:
        assert variables["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
        with pytest.raises(StageError, match="interrupted while it waited for a GPU"), lent(TWO, stop=stop):
            pass
    with lent(TWO) as variables:
        assert variables["CUDA_VISIBLE_DEVICES"] == "GPU-a"


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_without_gpus_nothing_is_locked(hidden: str, locks: Path) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": hidden, "A": "b"}
    with lent(environment) as variables:
        assert variables == environment
    assert not locks.exists()


def test_gpus_are_those_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices.visible({}) == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf 'GPU-1\\nGPU-2\\n'\n")
    tool.chmod(0o755)
    assert devices.visible({}) == ["GPU-1", "GPU-2"]


def test_a_killed_holder_frees_its_gpu_at_once(locks: Path) -> None:
    program = (
        "import pathlib, sys, threading, time; from flows import devices\n"
        "devices.LOCKS = pathlib.Path(sys.argv[1])\n"
        "with devices.lent({'CUDA_VISIBLE_DEVICES': '0'}, print, threading.Event()):\n"
        "    print('has it', flush=True); time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, str(locks)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tiny.ROOT, env=dict(os.environ), text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "has it\n"
        holder.kill()
        holder.wait()
        with lent({"CUDA_VISIBLE_DEVICES": "0"}) as variables:
            assert variables["CUDA_VISIBLE_DEVICES"] == "0"
