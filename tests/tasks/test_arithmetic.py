"""What a training computes in on a GPU: float32 in full or TF32, deterministic kernels, frozen layers in bfloat16."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from models import device
from tasks import train
from tasks.params import TrainParams
from tasks.training import control, machine

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


def test_trainings_in_tf32_and_in_float32_follow_each_other_in_a_process(trained):
    """The compiler asks for the precision, and PyTorch refuses to answer if it was set in two ways."""
    for precision in ("tf32", "no"):
        trained(precision=precision)
    assert torch.get_float32_matmul_precision() == "highest"


def test_deterministic_kernels_are_chosen_by_the_stage_and_named_in_its_facts(trained, monkeypatch):
    chosen, choose = [], machine.choose_kernels
    monkeypatch.setattr(machine, "choose_kernels", lambda params: chosen.append(params.deterministic) or choose(params))
    facts = json.loads((trained(deterministic=True) / "report" / "run.json").read_text(encoding="utf-8"))
    assert chosen == [True] and torch.are_deterministic_algorithms_enabled()
    assert facts["params"]["train.deterministic"] is True


@pytest.mark.parametrize(
    ("options", "on_gpu", "narrow"),
    [
        ({"precision": "bf16", "lora_rank": 2}, True, True),
        ({"precision": "bf16", "lora_rank": 2}, False, False),
        ({"precision": "no", "lora_rank": 2}, True, False),
        ({"precision": "bf16"}, True, False),
    ],
    ids=["adapter", "adapter on a CPU", "adapter in float32", "whole network"],
)
def test_the_base_of_an_adapter_is_in_bfloat16_on_a_gpu(prepared, tmp_path, monkeypatch, options, on_gpu, narrow):
    """The device is a stub; the training goes on with what it gets, and leaves the base as it is."""
    narrow_base = control.narrow_base
    monkeypatch.setattr(
        control,
        "narrow_base",
        lambda network, params, device: narrow_base(network, params, torch.device("cuda") if on_gpu else device),
    )
    (tmp_path / "base").mkdir()  # named and not read, because `prepared` starts from random weights
    (tmp_path / "base" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    run = prepared("text", init_from=str(tmp_path / "base"), steps=100, warmup_steps=0, sample_every=100, **options)
    parameters = dict(run.network.named_parameters())
    trained = {parameter.dtype for parameter in parameters.values() if parameter.requires_grad}
    frozen = {name: parameter.clone() for name, parameter in parameters.items() if not parameter.requires_grad}
    layers = [module for module in run.network.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    kept = {own.dtype for layer in layers for own in layer.parameters(recurse=False) if not own.requires_grad}
    assert trained == {torch.float32}
    assert kept == ({torch.bfloat16} if narrow else {torch.float32} if frozen else set())
    train.fit(run, None, [], until=2)
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())


def test_gradients_of_several_processes_are_views_of_the_buckets(prepared):
    """One copy of the gradients instead of two; the drill of two processes looks at the module of each."""
    assert prepared().accelerator.ddp_handler.gradient_as_bucket_view is True


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
