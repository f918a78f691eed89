"""The stand-in for a GPU refuses what a GPU refuses, and counts what makes the host wait."""

import pytest
import torch
from torch.nn import functional as F


def x() -> torch.Tensor:
    return torch.randn(3, 4, device="cuda")


REFUSED = {
    "two devices": lambda: x() + torch.ones(3, 4),
    "a mask of the CPU": lambda: x().masked_fill(torch.ones(3, 4, dtype=torch.bool), 0),
    "a weight of the CPU": lambda: F.linear(x(), torch.ones(2, 4)),
    "a generator of the CPU": lambda: torch.rand(3, generator=torch.Generator(), device="cuda"),
    "a generator of the GPU": lambda: torch.rand(3, generator=torch.Generator("cuda")),
    "an index of the GPU": lambda: torch.arange(3)[torch.zeros(2, dtype=torch.int64, device="cuda")],
    "an array of the GPU": lambda: x().numpy(),
    "two dtypes": lambda: F.linear(x(), torch.ones(2, 4, device="cuda", dtype=torch.bfloat16)),
}
WAITING = {
    "item": lambda: x().sum().item(),
    "tolist": lambda: x()[0].cpu().tolist(),
    "condition": lambda: bool(x().sum() > 0),
    "equal": lambda: torch.equal(x(), x()),
    "copy to the host": lambda: x().to("cpu", non_blocking=True),
    "copy to the device": lambda: torch.ones(3).to("cuda"),
    "copy of what is not pinned": lambda: torch.ones(3).to("cuda", non_blocking=True),
    "values": lambda: torch.tensor([1.0, 2.0], device="cuda"),
    "index of the CPU": lambda: x()[torch.tensor([0, 1])],
    "list as an index": lambda: x()[[0, 1]],
    "a blocking copy into pinned memory": lambda: torch.empty(3, 4, pin_memory=True).copy_(x()),
}
GOING_ON = {
    "a number of the CPU": lambda: x() * torch.tensor(2.0) + 1,
    "a row that is set": lambda: x().__setitem__(0, 1.0),
    "pinned memory to the device": lambda: torch.ones(3).pin_memory().to("cuda", non_blocking=True),
    "device to pinned memory": lambda: torch.empty(3, 4, pin_memory=True).copy_(x(), non_blocking=True),
    "a generator": lambda: torch.randn(3, generator=torch.Generator("cuda").manual_seed(1), device="cuda"),
    "what is there already": lambda: x().to("cuda"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_gpu_refuses(fake_gpu, name):
    with pytest.raises(RuntimeError):
        REFUSED[name]()


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", WAITING)
def test_what_waits_for_a_gpu(fake_gpu, name, inference):
    with torch.inference_mode(inference):
        assert len(fake_gpu.waits_during(WAITING[name])) == 1


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", GOING_ON)
def test_what_does_not_wait(fake_gpu, name, inference):
    with torch.inference_mode(inference):
        assert fake_gpu.waits_during(GOING_ON[name]) == []


def test_gradients_and_autocast(fake_gpu):
    layer, norm = torch.nn.Linear(4, 4).to("cuda"), torch.nn.LayerNorm(4).to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        hidden = layer(x())
        assert hidden.dtype == torch.bfloat16 and norm(hidden).dtype == torch.float32
    hidden.float().sum().backward()
    assert layer.weight.grad.is_cuda and layer.weight.grad.shape == (4, 4)


def test_nothing_of_it_stays():
    from tests.support.fake_cuda import fake_cuda

    before = torch.Generator, torch.empty, torch.Tensor.to, torch.nn.functional.linear
    with fake_cuda():
        x()
    assert before == (torch.Generator, torch.empty, torch.Tensor.to, torch.nn.functional.linear)
    assert not torch.cuda.is_available()
    with pytest.raises((RuntimeError, AssertionError)):
        x()
