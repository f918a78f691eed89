"""Fused AdamW without PyTorch's compiler."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from models.optimization.adamw import AdamW


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 3), torch.nn.Linear(3, 2)
    )


def loss_of(module: torch.nn.Module, step: int) -> torch.Tensor:
    """A loss on the batch of a step, in which the last layer has no part."""
    batch = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(step))
    return module[:3](batch).square().mean()


def train(module: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(module, step).backward()
        optimizer.step()


@pytest.fixture
def sides() -> list[tuple[torch.nn.Module, torch.optim.Optimizer]]:
    """The same network twice, with our optimizer and with that of torch."""
    ours, theirs = network(), network()
    return [
        (ours, AdamW(ours.parameters(), lr=0.01, weight_decay=0.1)),
        (theirs, torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1, fused=True)),
    ]


def test_makes_the_steps_of_torch_to_the_last_bit(sides):
    for module, optimizer in sides:
        train(module, optimizer, 4)
    (ours, _), (theirs, _) = sides
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    states = [optimizer.state_dict()["state"] for _, optimizer in sides]
    assert {i: set(slots) for i, slots in states[0].items()} == {i: set(slots) for i, slots in states[1].items()}
    assert all(torch.equal(states[0][i][key], states[1][i][key]) for i in states[0] for key in states[0][i])


def test_a_gradient_scaler_skips_a_step_that_overflows_without_reading_the_device(sides, monkeypatch):
    """As `torch.optim.AdamW` with `fused` does: the kernel itself leaves out the step."""
    for module, optimizer in sides:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(module, step) * (float("inf") if step == 2 else 1.0)).backward()
            scaler.unscale_(optimizer)
            with monkeypatch.context() as patched:
                patched.setattr(torch.Tensor, "item", lambda _: pytest.fail("the step waits for the device"))
                scaler.step(optimizer)
            scaler.update()
    (ours, optimizer), (theirs, _) = sides
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert next(iter(optimizer.state.values()))["step"] == 3


def test_a_closure_is_called_with_gradients_and_its_value_returned():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([parameter], lr=0.01, weight_decay=0.0)

    def closure() -> float:
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert torch.all(parameter < 1)


def test_a_loaded_state_continues_to_the_same_bytes():
    whole, part = network(), network()
    optimizer = AdamW(whole.parameters(), lr=0.01, weight_decay=0.1)
    train(whole, optimizer, 4)
    first = AdamW(part.parameters(), lr=0.01, weight_decay=0.1)
    train(part, first, 2)
    second = AdamW(part.parameters(), lr=0.01, weight_decay=0.1)
    second.load_state_dict(first.state_dict())
    train(part, second, 2, first=2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), part.parameters(), strict=True))


MUON = "from models.optimization.muon import MuonWithAdamW; optimizer = MuonWithAdamW(layer, 0.1, 0.1, 0.9, 0.0)"
ADAMW = "from models.optimization.adamw import AdamW; optimizer = AdamW(layer.parameters(), 0.1, 0.0)"


@pytest.mark.parametrize("lines", [MUON, ADAMW], ids=["muon", "adamw"])
def test_a_training_imports_no_compiler(lines):
    steps = "layer(torch.ones(2, 2)).sum().backward(); optimizer.step(); optimizer.zero_grad()"
    restored = "optimizer.load_state_dict(optimizer.state_dict())"
    counted = "from models.flops import forward_flops; assert forward_flops(layer, torch.ones(2, 2)) == 8"
    program = f"import sys, torch; layer = torch.nn.Linear(2, 2); {lines}; {steps}; {restored}; {counted}"
    done = subprocess.run([sys.executable, "-c", f"{program}; sys.exit('torch._dynamo' in sys.modules)"], check=False)
    assert done.returncode == 0
