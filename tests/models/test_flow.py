"""Rectified flow: samplers against diffusers' and a known solution, conversions, and the objective by log-SNR."""

import math

import numpy as np
import pytest
import torch

from models.networks.unet import UNet, UNetConfig
from models.noise import paths, samplers, schedules
from models.noise.paths import FLOW_PREDICTION, DiffusionPath, RectifiedFlow
from models.noise.samplers import Sampling, SchedulerConfig
from models.optimization.diffusion import add_noise, loss_weights, target
from models.optimization.timesteps import Density, Timesteps
from models.pipeline import PipelineInfo, load_pipeline, save_pipeline

SHAPE = (2, 1, 8, 8)
CPU = torch.device("cpu")


def velocity(x, t):
    """A fixed smooth 'network' that depends on x and t."""
    return torch.tanh(x + math.sin(t / 100)) - 0.3 * x


def drawn(sampler, steps, shift=1.0):
    """Return x after each step of ours, float32."""
    seen = []
    scheduler = SchedulerConfig(RectifiedFlow(1000, shift), FLOW_PREDICTION, clip_sample=False)
    denoise = samplers.denoiser(lambda x, t, _: velocity(x, t), scheduler)
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    samplers.sample(denoise, lambda: start, scheduler, Sampling(sampler, steps), lambda i, t, x, x0: seen.append(x))
    return start, seen


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 5, 20, 28])
def test_every_step_of_euler_equals_diffusers(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(1000, shift)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    x, ours = drawn("euler", steps, shift)
    levels = RectifiedFlow(1000, shift).sampled(steps)
    assert [level.t for level in levels] == pytest.approx(scheduler.timesteps.tolist(), rel=1e-6)
    for t, after in zip(scheduler.timesteps, ours, strict=True):
        x = scheduler.step(velocity(x, float(t)), t, x).prev_sample
        assert torch.allclose(x, after, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_saved_flow_draws_the_same_images_in_diffusers(tmp_path, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel

    network = UNet(UNetConfig(8, 1, (8, 16), (False, True), 1, 4, 8, conditions=4))
    weights = {name: 0.1 * torch.randn(value.shape) for name, value in network.state_dict().items()}
    names = {"schedule": paths.RECTIFIED_FLOW, "timesteps": 1000, "prediction": FLOW_PREDICTION, "train_key": "k"}
    info = PipelineInfo("label", channels=1, size=8, classes=["a", "b", "c"], null_label=3, **names)
    save_pipeline(tmp_path, network, weights, RectifiedFlow(1000, shift), info)
    ours = load_pipeline(tmp_path)
    assert ours.path == RectifiedFlow(1000, shift)

    unet = UNet2DModel.from_pretrained(tmp_path / "unet")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
    scheduler.set_timesteps(sigmas=[1 - i / 6 for i in range(6)])
    x, labels = torch.from_numpy(samplers.SeededNoise([1, 2, 3], (1, 8, 8))()), torch.tensor([0, 2, 1])
    with torch.inference_mode():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t, labels).sample, t, x).prev_sample
    drawn_by_us = ours.sample([1, 2, 3], [0, 2, 1], Sampling("euler", 6))
    assert np.abs(drawn_by_us - x.numpy()).max() < 1e-4


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_every_step_of_heun_equals_diffusers(steps, shift):
    from diffusers import FlowMatchHeunDiscreteScheduler

    scheduler = FlowMatchHeunDiscreteScheduler(1000, shift)
    scheduler.set_timesteps(steps)
    sigmas = torch.tensor([level.sigma for level in RectifiedFlow(1000, shift).sampled(steps)])
    # diffusers evaluates every level but the first twice, and chooses other levels itself
    scheduler.timesteps = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2)]) * 1000
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2), torch.zeros(1)])
    scheduler._step_index = 0
    x, ours = drawn("heun", steps, shift)
    after = []
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, float(t)), t, x).prev_sample
        after.append(x)
    for theirs, mine in zip(after[1::2] + after[-1:], ours, strict=True):
        assert torch.allclose(theirs, mine, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_step_of_the_multistep_solver_equals_diffusers(shift):
    from diffusers import DPMSolverMultistepScheduler

    steps = 12
    scheduler = DPMSolverMultistepScheduler(
        1000, prediction_type=FLOW_PREDICTION, use_flow_sigmas=True, algorithm_type="dpmsolver++", solver_order=2
    )
    scheduler.set_timesteps(steps)
    levels = RectifiedFlow(1000, shift).sampled(steps)
    scheduler.sigmas = torch.tensor([*(level.sigma for level in levels), 0.0], dtype=torch.float64)
    scheduler.timesteps = torch.tensor([level.t for level in levels], dtype=torch.float64)
    scheduler._step_index = 0
    x, ours = drawn("dpm_solver_pp_2m", steps, shift)
    for t, after in zip(scheduler.timesteps, ours, strict=True):
        x = scheduler.step(velocity(x, float(t)), t, x).prev_sample
        assert torch.allclose(x.float(), after, atol=1e-4)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("dpm_solver_pp_2m", 2)])
def test_order_of_convergence(sampler, order):
    """Halving the step divides the error by 2^order, on the ODE of Gaussian data, whose solution is known."""
    variance, path = 0.3, RectifiedFlow()

    def deviation(level):
        return math.sqrt(level.alpha**2 * variance + level.sigma**2)

    def denoise(x, level):  # E[x_0 | x_t] for Gaussian data
        return level.alpha * variance / deviation(level) ** 2 * x

    def error(steps):
        levels = [path.of_sigma(sigma) for sigma in np.linspace(0.95, 0.05, steps + 1)]
        seen = []
        samplers.SAMPLERS[sampler](
            denoise, np.ones(1), np.zeros, [*levels, paths.CLEAN], lambda i, t, x, x0: seen.append(x)
        )
        # the step from the last of these levels goes to a clean image; compare where it starts
        return abs(seen[-2] - deviation(levels[-1]) / deviation(levels[0]))[0]

    assert math.log2(error(20) / error(40)) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("sampler", samplers.OF_FLOW)
def test_a_perfect_velocity_gives_the_image(sampler):
    image = np.linspace(-1, 1, 64).reshape(1, 1, 8, 8).astype(np.float32)
    scheduler = SchedulerConfig(RectifiedFlow(), FLOW_PREDICTION, clip_sample=False)

    def predict(x, t, _):
        return (x - image) / (t / 1000)

    noise = samplers.SeededNoise([3], (1, 8, 8))
    result = samplers.sample(samplers.denoiser(predict, scheduler), noise, scheduler, Sampling(sampler, 7))
    assert np.abs(result - image).max() < 1e-5


@pytest.mark.parametrize(("path", "sampler"), [("flow", "ddpm"), ("flow", "ddim"), ("diffusion", "heun")])
def test_a_sampler_that_the_path_does_not_have_is_named(path, sampler):
    of = RectifiedFlow() if path == "flow" else DiffusionPath([0.9, 0.5, 0.1])
    with pytest.raises(ValueError, match=f"has no sampler '{sampler}'; use one of: .*dpm_solver_pp_2m"):
        samplers.sample(lambda x, level: x, lambda: np.zeros(1), SchedulerConfig(of, "sample"), Sampling(sampler, 2))


def test_euler_is_ddim_in_other_units():
    """`x / sqrt(alpha^2 + sigma^2)` turns the flow's levels into a variance-preserving path, and Euler into DDIM."""
    levels = RectifiedFlow().sampled(9)
    scaled = [
        paths.Level(level.t, *(value / math.hypot(level.alpha, level.sigma) for value in level[1:])) for level in levels
    ]

    def denoise(x, level, stretch):
        return np.tanh(x * stretch(level) + level.t / 1000)

    def of_flow(level):
        return math.hypot(1 - level.t / 1000, level.t / 1000)

    start = np.random.default_rng(0).standard_normal(SHAPE)
    flow = samplers.euler(lambda x, level: denoise(x, level, lambda _: 1), start, np.zeros, [*levels, paths.CLEAN])
    ddim = samplers.ddim(lambda x, level: denoise(x, level, of_flow), start, np.zeros, [*scaled, paths.CLEAN])
    assert np.abs(flow - ddim).max() < 1e-12


@pytest.mark.parametrize("prediction", paths.PREDICTION_TYPES)
@pytest.mark.parametrize("level", [RectifiedFlow().level(t) for t in (1, 300, 900)] + [DiffusionPath([0.7]).level(0)])
def test_what_the_network_predicts_determines_the_image_on_every_path(prediction, level):
    generator = torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    alpha, sigma = (torch.full((2,), value, dtype=torch.float64) for value in level[1:])
    output = target(prediction, x0, eps, alpha, sigma)
    assert torch.allclose(paths.to_x0(prediction, output, add_noise(x0, eps, alpha, sigma), level), x0, atol=1e-9)


def test_the_velocity_in_numbers():
    """At t = 250 of 1,000: alpha 0.75 and sigma 0.25."""
    x0, eps = torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), -1.0)
    alpha, sigma = (torch.tensor([value]) for value in RectifiedFlow(1000).level(250)[1:])
    assert add_noise(x0, eps, alpha, sigma).item() == pytest.approx(0.75 * 0.5 - 0.25)
    assert target(FLOW_PREDICTION, x0, eps, alpha, sigma).item() == -1.5


@pytest.mark.parametrize("prediction", paths.PREDICTION_TYPES)
@pytest.mark.parametrize("path", [RectifiedFlow(), schedules.path_of("cosine", 1000)], ids=["flow", "diffusion"])
def test_min_snr_is_the_same_objective_whatever_the_network_predicts(path, prediction):
    """The weighted error of every prediction type is min(SNR, gamma) times the error of x_0, at equal log-SNR."""
    level, gamma = path.level(400), 2.0
    generator = torch.Generator().manual_seed(2)
    x0, wrong, eps = (torch.randn(1, 1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    alpha, sigma = (torch.tensor([value], dtype=torch.float64) for value in level[1:])
    x = add_noise(x0, eps, alpha, sigma)
    output = target(prediction, wrong, (x - level.alpha * wrong) / level.sigma, alpha, sigma)
    error = (output - target(prediction, x0, eps, alpha, sigma)).square().mean()
    weighted = loss_weights("min_snr", prediction, alpha, sigma, gamma) * error
    assert weighted.item() == pytest.approx(min(math.exp(level.log_snr), gamma) * (wrong - x0).square().mean().item())


def weight_by_log_snr(path, prediction, density):
    """Return log-SNR and the total weight of the error of x_0 there: loss weight times density of log-SNR."""
    timesteps = Timesteps(path, CPU, density)
    t = timesteps.draw(400_000, torch.Generator().manual_seed(0))
    log_snr, edges = timesteps.log_snr(t).double().numpy(), np.linspace(-3, 3, 25)
    middle = (edges[1:] + edges[:-1]) / 2
    counts = np.histogram(log_snr, edges)[0] / len(log_snr)
    snr = np.exp(middle)
    alpha, sigma = np.sqrt(snr / (1 + snr)), np.sqrt(1 / (1 + snr))
    if isinstance(path, RectifiedFlow):
        alpha, sigma = (value / (alpha + sigma) for value in (alpha, sigma))
    return middle, counts * paths.error_scale(prediction, snr, alpha, sigma)


def test_v_on_the_cosine_schedule_and_the_velocity_of_a_flow_are_one_objective():
    """Uniform timesteps and plain losses weight log-SNR alike, by exp(log SNR / 2) (Kingma & Gao 2023, section 4)."""
    cosine = weight_by_log_snr(schedules.path_of("cosine", 10_000), "v_prediction", Density())
    flow = weight_by_log_snr(RectifiedFlow(), FLOW_PREDICTION, Density())
    ratio = (flow[1] / cosine[1]) / (flow[1] / cosine[1]).mean()
    assert np.abs(ratio - 1).max() < 0.06
    known = np.exp(flow[0] / 2)
    assert np.abs(flow[1] / known / (flow[1] / known).mean() - 1).max() < 0.06


@pytest.mark.parametrize("path", [RectifiedFlow(500), schedules.path_of("cosine", 500)], ids=["flow", "diffusion"])
class TestTimesteps:
    def draw(self, path, count=200_000, **density):
        timesteps = Timesteps(path, CPU, Density(**density))
        return timesteps, timesteps.draw(count, torch.Generator().manual_seed(0))

    def test_uniform_timesteps_cover_the_path(self, path):
        t = self.draw(path)[1]
        assert t.dtype == (torch.float32 if isinstance(path, RectifiedFlow) else torch.int64)
        assert 0 <= t.min() < 2
        assert 498 < t.max() <= 500
        assert np.histogram(t.numpy(), 10, (0, 500))[0] == pytest.approx(20_000, rel=0.03)

    def test_logit_normal_has_its_mean_and_deviation(self, path):
        t = self.draw(path, kind="logit_normal", mean=0.3, std=0.8)[1]
        share = (t.double() + (0 if isinstance(path, RectifiedFlow) else 0.5)) / 500
        logit = (share / (1 - share)).log()
        assert logit.mean().item() == pytest.approx(0.3, abs=0.01)
        assert logit.std().item() == pytest.approx(0.8, abs=0.01)

    def test_log_snr_is_normal_where_it_is_asked_for(self, path):
        timesteps, t = self.draw(path, kind="normal_log_snr", mean=-0.5, std=1.5)
        log_snr = timesteps.log_snr(t)
        assert log_snr.mean().item() == pytest.approx(-0.5, abs=0.02)
        assert log_snr.std().item() == pytest.approx(1.5, abs=0.02)

    def test_shift_moves_log_snr_towards_noise(self, path):
        plain, shifted = (self.draw(path, kind="logit_normal", shift=shift) for shift in (1.0, 3.0))
        moved = plain[0].log_snr(plain[1]) - shifted[0].log_snr(shifted[1])
        assert moved.median().item() == pytest.approx(2 * math.log(3), abs=0.02)

    def test_of_log_snr_is_the_inverse(self, path):
        timesteps = Timesteps(path, CPU)
        t = torch.arange(1, 499) if isinstance(path, DiffusionPath) else torch.linspace(1, 499, 200)
        assert torch.allclose(timesteps.of_log_snr(timesteps.log_snr(t)).double(), t.double(), atol=1e-3)

    def test_scales_are_those_of_the_path(self, path):
        timesteps = Timesteps(path, CPU)
        t = torch.tensor([3, 250, 480])
        for got, index in zip(torch.stack(timesteps.scales(t), 1).tolist(), t.tolist(), strict=True):
            assert got == pytest.approx(path.level(index)[1:], rel=1e-5)

    def test_an_unknown_density_is_named(self, path):
        with pytest.raises(ValueError, match=r"unknown density 'beta'; known: uniform, logit_normal, normal_log_snr"):
            Timesteps(path, CPU, Density("beta"))


def test_the_shift_of_a_flow_is_that_of_sd3():
    """Esser et al. 2024, eq. 23, for training timesteps as for the samplers' levels."""
    timesteps = Timesteps(RectifiedFlow(1000), CPU, Density(shift=3.0))
    plain = Timesteps(RectifiedFlow(1000), CPU).draw(100, torch.Generator().manual_seed(0)) / 1000
    shifted = timesteps.draw(100, torch.Generator().manual_seed(0)) / 1000
    assert torch.allclose(shifted, 3 * plain / (1 + 2 * plain), atol=1e-5)
    assert [level.sigma for level in RectifiedFlow(1000, 3.0).sampled(2)] == pytest.approx([1, 0.75])


def test_spread_avoids_levels_without_signal_or_noise():
    assert RectifiedFlow(1000).spread(3) == [250, 500, 750]
    zero_terminal = schedules.path_of("linear", 100, zero_terminal_snr=True)
    assert zero_terminal.spread(3) == [0, 49, 98]
    assert zero_terminal.level(99).log_snr == -math.inf
