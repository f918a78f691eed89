"""Drawing in a lower precision, guidance from one call, and noise that a thread draws ahead."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.images.pictures import decibel, squared_errors
from models.networks import guidance
from models.networks.guidance import Joined
from models.networks.network import predictor
from models.networks.precision import in_precision
from models.networks.text_unet import TextUNet, TextUNetConfig
from models.networks.unet import UNet, UNetConfig
from models.noise.samplers import Sampling, SchedulerConfig, SeededNoise
from models.noise.schedules import path_of
from models.parallel import NoiseAhead
from models.pipeline import Pipeline, PipelineInfo
from tests.support.networks import randomised

CLASSES = ["a", "b"]
GUIDED = Sampling("ddpm", 4, guidance_scale=2.0)


@pytest.fixture
def pipeline():
    network = randomised(UNet(UNetConfig(8, 1, (8, 16), (False, True), 1, 4, 8, conditions=3)))
    info = PipelineInfo("label", 1, 8, "cosine", 30, "v_prediction", "0" * 64, CLASSES, null_label=2)
    scheduler = SchedulerConfig(path_of("cosine", 30), "v_prediction")
    return Pipeline(network.requires_grad_(False), scheduler, info)


class Counted(torch.nn.Module):
    """A network that notes the batch of each call and fails beyond `most` images, as a full GPU does."""

    def __init__(self, network, most=1000):
        super().__init__()
        self.network, self.most, self.batches = network, most, []
        self.config = network.config

    def forward(self, x, t, condition=None):
        self.batches.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.network(x, t, condition)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_lower_precision_draws_nearly_the_same_images(pipeline, precision):
    pipeline = replace(pipeline, companions={"guide": pipeline.network})
    lower = in_precision(pipeline, precision)
    drawn, expected = (each.sample(range(4), [0, 1, 0, 1], GUIDED) for each in (lower, pipeline))
    assert drawn.dtype == np.float32 and not np.array_equal(drawn, expected)
    assert decibel(max(squared_errors(drawn, expected))) > 25
    stored = {name: weights.dtype for name, weights in lower.network.named_parameters()}
    assert stored["conv_in.weight"] != torch.float32 == stored["conv_norm_out.weight"]
    assert next(lower.companions["guide"].parameters()).dtype != torch.float32
    assert {weights.dtype for weights in pipeline.network.parameters()} == {torch.float32}, "the original is unchanged"


def test_a_pipeline_of_latents_decodes_in_its_precision_by_the_memory_of_a_gpu(pipeline, monkeypatch):
    decoded = []

    def decode(network, latents, precision, memory):
        decoded.append((precision, memory))
        return latents

    monkeypatch.setattr("models.networks.autoencoder.decode", decode)
    monkeypatch.setattr("models.pipeline.memory_of", lambda device: 80)
    latents = replace(pipeline, autoencoder=object())
    for each in (latents, in_precision(latents, "bf16"), replace(latents, device="cuda:1")):
        each.decode(torch.zeros(1, 1, 8, 8))
    assert decoded == [("no", None), ("bf16", None), ("no", 80)]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_interpolations_are_drawn_in_the_precision_of_the_pipeline(pipeline, precision):
    from models.interpolation import Pair, between_conditions, between_noises

    pairs, shares = [Pair((1, 2), (0, 1))], [0.0, 0.5, 1.0]
    guided = replace(GUIDED, guidance="auto")
    pipeline = replace(pipeline, companions={"guide": pipeline.network})
    for draw in (between_conditions, between_noises):
        lower, exact = (
            draw(each, pairs, shares, guided, 3)[0] for each in (in_precision(pipeline, precision), pipeline)
        )
        assert decibel(max(squared_errors(lower, exact))) > 25 and not np.array_equal(lower, exact)


def test_float32_is_the_same_pipeline(pipeline):
    assert in_precision(pipeline, "no") is pipeline


def test_guidance_takes_one_call_of_twice_the_batch_where_a_device_gains_from_it(pipeline, monkeypatch):
    expected = pipeline.sample(range(3), [0, 1, 0], GUIDED)
    counted = Counted(pipeline.network)
    assert not guidance.joins("cpu") and guidance.joins("cuda")
    monkeypatch.setattr(guidance, "joins", lambda device: True)
    drawn = replace(pipeline, network=counted).sample(range(3), [0, 1, 0], GUIDED)
    assert counted.batches == [6] * 4
    assert np.abs(drawn - expected).max() < 1e-5


def test_guidance_takes_two_calls_after_the_memory_did_not_suffice(pipeline, monkeypatch):
    expected = pipeline.sample(range(3), [0, 1, 0], GUIDED)
    counted = Counted(pipeline.network, most=5)
    monkeypatch.setattr(guidance, "joins", lambda device: True)
    full = replace(pipeline, network=counted)
    drawn = full.sample(range(3), [0, 1, 0], GUIDED)
    assert counted.batches == [6, *[3] * 8]
    assert np.array_equal(drawn, expected)
    counted.batches.clear()
    full.sample(range(3), [0, 1, 0], GUIDED)
    assert counted.batches == [3] * 8, "later batches do not try again"
    counted.batches.clear()
    full.sample(range(2), [0, 1], GUIDED)
    assert counted.batches == [4] * 4, "a smaller batch fits"


def test_context_and_maps_are_given_to_both_halves_of_a_joined_call():
    class Summed(torch.nn.Module):
        def forward(self, x, _, condition, maps):
            return x.sum(dim=1, keepdim=True) + maps + condition[:, None, None, None]

    x, context, maps = torch.randn(2, 1, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(2, 1, 4, 4)
    condition, null = torch.tensor([1.0, 2.0]), torch.zeros(2)
    found = Joined(Summed(), context, maps, "no", Summed())(x, 3, condition, null)
    one = predictor(Summed(), context, maps)
    assert all(torch.equal(a, b) for a, b in zip(found, (one(x, 3, condition), one(x, 3, null)), strict=True))


def test_noise_drawn_ahead_has_the_bytes_and_the_order_of_noise_drawn_when_asked_for():
    draw = SeededNoise(range(5), (1, 4, 4))
    expected = [draw() for _ in range(4)]
    threads = set()
    again = SeededNoise(range(5), (1, 4, 4))

    def noted():
        threads.add(threading.current_thread().name)
        return again()

    with NoiseAhead(noted, "cpu", ahead=True) as noise:
        found = [noise().numpy() for _ in range(4)]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert any(name.startswith("noise") for name in threads)
    assert not any(thread.name.startswith("noise") for thread in threading.enumerate())


def test_the_thread_works_while_the_caller_does():
    began = threading.Event()
    draws = iter(range(10))

    def draw():
        if next(draws) > 0:
            began.set()
        return np.zeros((1, 1), np.float32)

    with NoiseAhead(draw, "cpu", ahead=True) as noise:
        noise()
        assert began.wait(10), "the second noise is drawn before it is asked for"
    began.clear()
    with NoiseAhead(draw, "cpu", ahead=False) as noise:
        noise()
        assert noise.pool is None


@pytest.mark.parametrize(
    ("sampling", "adds"),
    [
        (Sampling("ddpm", 4), True),
        (Sampling("euler_ancestral", 4), True),
        (Sampling("consistency", 2), True),
        (Sampling("ddim", 4, eta=0.5), True),
        (Sampling("ddim", 4), False),
        (Sampling("dpm_solver_pp_2m", 4), False),
    ],
)
def test_which_samplers_draw_noise_after_the_first(pipeline, sampling, adds):
    """Counted, so that a sampler which begins to draw noise is noticed."""
    from models.noise.samplers import sample

    draw, count = SeededNoise(range(2), (1, 8, 8)), []

    def noise():
        count.append(1)
        return torch.from_numpy(draw())

    with torch.inference_mode():
        sample(pipeline.denoiser([0, 1]), noise, pipeline.scheduler, sampling)
    assert (len(count) > 1) == adds == sampling.adds_noise


def test_the_frozen_base_of_an_adapter_in_bfloat16_trains_the_same_for_less_memory():
    """Autocast converts the base to bfloat16 at every call, so storing it so changes neither loss nor gradient."""
    config = TextUNetConfig(
        size=8, channels=4, cross_attention_dim=32, block_out_channels=(16, 32), attention=(False, True),
        layers_per_block=1, norm_num_groups=8, attention_head_dim=8, lora_rank=2,
    )  # fmt: skip
    network = randomised(TextUNet(config))
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 32)

    def loss_and_gradients():
        with torch.autocast("cpu", torch.bfloat16):
            loss = network(*inputs).float().square().mean()
        return [loss, *torch.autograd.grad(loss, trained)]

    def size():
        return sum(parameter.nbytes for parameter in network.parameters())

    wide, before = loss_and_gradients(), size()
    network.freeze_in(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(wide, loss_and_gradients(), strict=True))
    assert {parameter.dtype for parameter in trained} == {torch.float32} == {network.conv_norm_out.weight.dtype}
    assert network.conv_in.weight.dtype == torch.bfloat16
    assert size() < 0.55 * before
