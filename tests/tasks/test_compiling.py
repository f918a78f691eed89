"""Compilation of the network: by torch's own counts of graphs, with a backend that generates no code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from models.networks.dit import DiTConfig
from models.networks.network import build
from models.networks.unet import UNetConfig
from tasks.params import TrainParams
from tasks.training import compiling, machine

EAGER = {"backend": "eager"}
FLAT = UNetConfig(8, 1, (8,), (True,), layers_per_block=1, norm_num_groups=4, attention_head_dim=4)
DEEP = DiTConfig(size=8, channels=1, patch_size=4, width=16, depth=6, heads=2)


@pytest.fixture
def counted() -> Iterator[dict[str, int]]:
    """Return dynamo's counts, from zero: `unique_graphs` and `calls_captured`, the operators in them."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    torch.compiler.reset()
    counters.clear()
    yield counters["stats"]
    torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = limits
    torch.compiler.reset()


def test_each_bucket_has_a_graph_of_its_own(counted):
    """Ten resolutions, two more than torch compiles by default."""
    shapes = [(4 + 2 * n, 8) for n in range(10)]
    network = torch.nn.Conv2d(1, 1, 3)
    module = compiling.compiled(network, network, len(shapes), **EAGER)
    for _ in range(2):
        for height, width in shapes:
            module(torch.zeros(2, 1, height, width))
        assert counted["unique_graphs"] == len(shapes)


def test_blocks_of_a_large_network_are_compiled_once(counted):
    network = build(DEEP)
    inputs = torch.randn(2, 1, 8, 8), torch.zeros(2), None
    expected = network(*inputs)
    compiling.compiled(network, network, 1, **EAGER)(*inputs)
    whole = counted["calls_captured"]
    torch.compiler.reset()
    counted.clear()
    names = set(network.state_dict())
    module = compiling.compiled(network, network, 1, large=0, **EAGER)
    assert torch.equal(module(*inputs), expected)
    assert counted["unique_graphs"] == 1, "one for all six blocks"
    assert counted["calls_captured"] < whole / 4
    assert set(network.state_dict()) == names


def test_previews_of_another_shape_compile_nothing(counted):
    network = build(DEEP)
    with compiling.without(network):  # nothing is compiled in place
        pass
    compiling.compiled(network, network, 1, large=0, **EAGER)
    with compiling.without(network):
        network(torch.zeros(3, 1, 8, 8), torch.zeros(3), None)
    assert not counted["unique_graphs"]
    network(torch.zeros(3, 1, 8, 8), torch.zeros(3), None)
    assert counted["unique_graphs"] == 1


def test_the_blocks_of_each_network_are_found():
    from models.networks.text_unet import TextUNet, TextUNetConfig

    assert len(compiling.repeated_blocks(build(DEEP))) == 6
    flat = compiling.repeated_blocks(build(FLAT))
    assert {type(block).__name__ for block in flat} == {"ResnetBlock", "Attention"}
    text = TextUNet(TextUNetConfig(8, 1, 8, (8, 8), (True, True), layers_per_block=1, norm_num_groups=4))
    assert {type(block).__name__ for block in compiling.repeated_blocks(text)} == {
        "ResnetBlock2D",
        "BasicTransformerBlock",
    }


@pytest.mark.parametrize(("setting", "cpu", "gpu"), [(False, False, False), (True, True, True), ("gpu", False, True)])
def test_whether_a_machine_compiles(monkeypatch, setting, cpu, gpu):
    params = TrainParams.model_construct(compile=setting)
    for available, expected in ((False, cpu), (True, gpu)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert compiling.wanted(params) == expected


def test_deterministic_kernels(monkeypatch):
    monkeypatch.delenv(machine.CUBLAS, raising=False)
    try:
        machine.choose_kernels(TrainParams.model_construct(deterministic=True))
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert machine.os.environ[machine.CUBLAS] == ":4096:8"
    finally:
        machine.choose_kernels(TrainParams.model_construct())
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark
