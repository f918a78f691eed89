"""Compilation of the network: by torch's own counts of graphs, with a backend that generates no code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from models.images.pictures import decibel, squared_errors
from models.networks import compilation, controlnet, guidance
from models.networks.compilation import Compiler, compiled_pipeline
from models.networks.dit import DiTConfig
from models.networks.network import build
from models.networks.precision import in_precision
from models.networks.text_unet import TextUNet, TextUNetConfig
from models.networks.unet import UNet, UNetConfig
from models.noise.samplers import Sampling, SchedulerConfig
from models.noise.schedules import path_of
from models.pipeline import Pipeline, PipelineInfo
from tests.support.networks import randomised

EAGER = {"backend": "eager"}
FLAT = UNetConfig(8, 1, (8,), (True,), layers_per_block=1, norm_num_groups=4, attention_head_dim=4)
SMALL = DiTConfig(size=8, channels=1, patch_size=4, width=16, depth=1, heads=2, conditions=4)
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
    module = compilation.compiled(network, network, len(shapes), **EAGER)
    for _ in range(2):
        for height, width in shapes:
            module(torch.zeros(2, 1, height, width))
        assert counted["unique_graphs"] == len(shapes)


def test_blocks_of_a_large_network_are_compiled_once(counted):
    network = build(DEEP)
    inputs = torch.randn(2, 1, 8, 8), torch.zeros(2), None
    expected = network(*inputs)
    compilation.compiled(network, network, 1, **EAGER)(*inputs)
    whole = counted["calls_captured"]
    torch.compiler.reset()
    counted.clear()
    names = set(network.state_dict())
    module = compilation.compiled(network, network, 1, large=0, **EAGER)
    assert torch.equal(module(*inputs), expected)
    assert counted["unique_graphs"] == 1, "one for all six blocks"
    assert counted["calls_captured"] < whole / 4
    assert set(network.state_dict()) == names


def test_previews_of_another_shape_compile_nothing(counted):
    network = build(DEEP)
    with compilation.without(network):  # nothing is compiled in place
        pass
    compilation.compiled(network, network, 1, large=0, **EAGER)
    with compilation.without(network):
        network(torch.zeros(3, 1, 8, 8), torch.zeros(3), None)
    assert not counted["unique_graphs"]
    network(torch.zeros(3, 1, 8, 8), torch.zeros(3), None)
    assert counted["unique_graphs"] == 1


def test_the_blocks_of_each_network_are_found():
    assert len(compilation.repeated_blocks(build(DEEP))) == 6
    flat = compilation.repeated_blocks(build(FLAT))
    assert {type(block).__name__ for block in flat} == {"ResnetBlock", "Attention"}
    text = TextUNet(TextUNetConfig(8, 1, 8, (8, 8), (True, True), layers_per_block=1, norm_num_groups=4))
    assert {type(block).__name__ for block in compilation.repeated_blocks(text)} == {
        "ResnetBlock2D",
        "BasicTransformerBlock",
    }


@pytest.mark.parametrize(("setting", "cpu", "gpu"), [(False, False, False), (True, True, True), ("gpu", False, True)])
def test_whether_a_machine_compiles(monkeypatch, setting, cpu, gpu):
    for available, expected in ((False, cpu), (True, gpu)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert compilation.wanted(setting) == expected


# Pipelines that draw


@pytest.fixture
def pipeline() -> Pipeline:
    """A class-conditional pipeline of pixels with a guide."""
    config = replace(FLAT, conditions=4)
    network, guide = (randomised(UNet(config)).requires_grad_(False) for _ in range(2))
    info = PipelineInfo("label", 1, 8, "cosine", 30, "v_prediction", "0" * 64, ["a", "b", "c"], null_label=3)
    scheduler = SchedulerConfig(path_of("cosine", 30), "v_prediction")
    return Pipeline(network, scheduler, info, companions={"guide": guide})


def drawn_by(pipeline: Pipeline, count: int, batch_size: int = 5, **options: Any) -> np.ndarray:
    return pipeline.sample(
        range(count), [n % 3 for n in range(count)], Sampling("ddpm", 4, **options), batch_size=batch_size
    )


@pytest.mark.parametrize("joins", [False, True])
def test_one_graph_serves_all_steps_and_batches_and_one_more_the_guidance(pipeline, counted, monkeypatch, joins):
    """The last batch has two images, later draws have one, and the guide is a network of the same architecture."""
    monkeypatch.setattr(guidance, "joins", lambda device: joins)
    compiled = compiled_pipeline(pipeline, "eager")
    for count, options, graphs in (
        (12, {}, 1),
        (12, {"guidance_scale": 2.0}, 1 + joins),
        (1, {"guidance_scale": 3.0}, 1 + joins),
        (1, {}, 1 + joins),
        (7, {"guidance_scale": 2.0, "guidance": "auto"}, 1 + joins),
    ):
        images = drawn_by(compiled, count, **options)
        assert counted["unique_graphs"] == graphs, options
        np.testing.assert_allclose(images, drawn_by(pipeline, count, **options), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_steps_share_a_graph_in_nhwc(counted, channels):
    """The output is x0 and in NHWC, and with it x after the first step of DDPM."""
    config = UNetConfig(8, channels, (8, 16), (False, True), 1, 4, 8)
    network = randomised(UNet(config)).requires_grad_(False).to(memory_format=torch.channels_last)
    info = PipelineInfo("none", channels, 8, "cosine", 30, "sample", "0" * 64, [])
    pipeline = Pipeline(network, SchedulerConfig(path_of("cosine", 30), "sample"), info)
    compiled = compiled_pipeline(pipeline, "eager")
    compiled.sample(range(7), None, Sampling("ddpm", 4), batch_size=5)
    assert counted["unique_graphs"] == 1


def test_whole_batches_have_the_bytes_of_the_uncompiled_network(pipeline, counted):
    assert drawn_by(compiled_pipeline(pipeline, "eager"), 10).tobytes() == drawn_by(pipeline, 10).tobytes()


@pytest.mark.parametrize("large", [0, compilation.LARGE])
def test_a_pipeline_shares_its_weights_with_its_compiled_copy_and_stays_uncompiled(pipeline, counted, large):
    compiled = compiled_pipeline(pipeline, "eager", large)
    expected = drawn_by(pipeline, 5)
    assert not counted["unique_graphs"]
    assert compiled.network.conv_in.weight is pipeline.network.conv_in.weight
    assert np.array_equal(drawn_by(compiled, 5), expected) and counted["unique_graphs"]


def test_callbacks_receive_no_rows_that_fill_a_batch(pipeline, counted):
    seen = []
    compiled = compiled_pipeline(pipeline, "eager")
    compiled.sample(
        range(7), [0] * 7, Sampling("ddim", 2), batch_size=5, callback=lambda i, t, x, x0: seen.append(len(x))
    )
    assert seen == [5, 5, 2, 2]


def test_each_device_compiles_once_for_all_draws(pipeline, counted, two_devices):
    """Ten shapes, two more than torch compiles by default, whose limits belong to a thread."""
    small = randomised(build(SMALL)).requires_grad_(False)  # one of many layers is traced for seconds at each shape
    pipeline = replace(pipeline, network=small, companions={})
    compiled = compiled_pipeline(pipeline, "eager")
    for size in range(1, 11):
        divided = drawn_by(compiled, 4 * size + 1, size)
        np.testing.assert_allclose(divided, drawn_by(pipeline, 4 * size + 1, size), atol=1e-5)
    graphs = counted["unique_graphs"]
    assert 10 <= graphs <= 20, "the stubs are both the CPU, so one may take the graph of the other"
    assert compiled.on("cpu:1").network is compiled.on("cpu:1").network is not compiled.network
    for _ in range(3):
        drawn_by(compiled, 41, 10)
    assert counted["unique_graphs"] <= 20


def test_memory_that_does_not_suffice_for_a_whole_batch_decides_for_the_last_one_as_well():
    batches = []

    def network(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        batches.append(len(x))
        if len(x) > 5:
            raise torch.OutOfMemoryError
        return x + condition[:, None]

    owner = torch.nn.Linear(1, 1)
    for count in (5, 2):
        x, condition = torch.randn(count, 3), torch.ones(count)
        first, second = guidance.Joined(network, None, None, "no", owner, rows=5)(x, 3, condition, 0 * condition)
        assert torch.equal(first, x + 1) and torch.equal(second, x)
    assert batches == [10, 5, 5, 5, 5]


def test_a_u_net_with_a_controlnet_is_compiled(counted):
    """Its inner network is called by `controlled` and not by the U-Net's `forward`."""
    config = TextUNetConfig(8, 2, 12, (8,), (True,), 1, 4, 8)
    unet = randomised(TextUNet(config)).requires_grad_(False)
    control = randomised(controlnet.from_unet(unet, (4, 6))).requires_grad_(False)
    inputs = torch.randn(2, 2, 8, 8), torch.tensor([3, 15]), torch.randn(2, 5, 12)
    compiler, maps = Compiler("eager"), torch.rand(2, 3, 16, 16)
    both = [
        controlnet.Controlled(unet, control),
        controlnet.Controlled(*(compiler.on(n, "cpu") for n in (unet, control))),
    ]
    with torch.inference_mode():
        plain, compiled = (network(*inputs, maps) for network in both)
        assert torch.equal(plain, compiled) and counted["unique_graphs"] == 2
        assert torch.equal(unet(*inputs), both[1].unet(*inputs)) and counted["unique_graphs"] == 3


@pytest.mark.gpu
def test_a_compiled_network_draws_in_nhwc_on_a_gpu(pipeline):
    lower = in_precision(pipeline.on("cuda"), "bf16")
    images, expected = (drawn_by(each, 12, guidance_scale=2.0) for each in (compiled_pipeline(lower), lower))
    assert decibel(max(squared_errors(images, expected))) > 25
