"""What a training computes float32 in on a GPU: in full, or in TF32 if it says so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from models import device
from tasks.params import TrainParams
from tasks.training import machine

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """What PyTorch begins with; afterwards what was found."""
    before = found()
    device.set_arithmetic(tf32=True)
    yield
    machine.choose_kernels(TrainParams.model_construct())
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark = before


def found() -> tuple[bool, bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark


@pytest.mark.parametrize(("precision", "tf32"), [("no", False), ("tf32", True), ("bf16", False)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_float32_is_full_unless_the_training_says_tf32(prepared, precision, tf32, deterministic):
    """For accelerate `tf32` is float32. TF32 gives the same bits in every run, too."""
    run = prepared(precision=precision, deterministic=deterministic)
    assert found() == (tf32, tf32, not deterministic)
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert run.accelerator.mixed_precision == ("bf16" if precision == "bf16" else "no")


def test_on_a_cpu_tf32_is_float32(prepared):
    losses = []
    for precision in ("no", "tf32"):
        run = prepared(precision=precision)
        losses.append(run.backward(run.objective, run.batches.draw(0)))
    assert torch.equal(*losses)


def test_it_is_set_without_importing_the_compiler():
    """That takes a second, of which a training on a CPU has no use."""
    code = (
        "import sys; from tasks.params import TrainParams; from tasks.training import machine; "
        "machine.choose_kernels(TrainParams.model_construct()); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
