"""Consistency tuning: its algebra by hand, a Gaussian problem with a known solution, and the sampler."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from models.noise import samplers
from models.noise.paths import CLEAN, FLOW_PREDICTION, DiffusionPath, Level, RectifiedFlow
from models.noise.samplers import Sampling, SchedulerConfig
from models.noise.schedules import path_of
from models.optimization import consistency
from models.optimization.consistency import Tuning
from models.optimization.diffusion import denoised
from models.optimization.timesteps import Timesteps

CPU = torch.device("cpu")
FLOW, COSINE = RectifiedFlow(1000), path_of("cosine", 1000)
OF_PATH = [(FLOW, FLOW_PREDICTION), (COSINE, "v_prediction")]
SHAPE = (5, 1, 8, 8)


def batch(path, seed=0):
    """Return x0, eps and t of five samples."""
    generator = torch.Generator().manual_seed(seed)
    x0, eps = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    t = torch.tensor([1.0, 200, 500, 900, 990])
    return x0, eps, t if path is FLOW else t.long()


class Scaled(nn.Module):
    """A network w x + t / 1000 that records what it was given and what it returned."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.w, self.dropout, self.seen = nn.Parameter(torch.tensor(0.3)), nn.Dropout(dropout), []

    def forward(self, x, t, _):
        output = self.dropout(self.w * x + t[:, None, None, None] / 1000)
        self.seen.append((x, t, output))
        return output


def test_ratio_by_hand():
    s = torch.tensor([0.0, 1.0, 1e6], dtype=torch.float64)
    tuning = Tuning(q=2, k=8, b=1, d=100)
    wide = 1 + 8 / (1 + math.e)
    for step, q in ((0, 2), (99, 2), (100, 4), (299, 8), (300, 16), (500, 64)):
        expected = [max(0.0, 1 - n / q) for n in (5.0, wide, 1.0)]
        assert consistency.ratio(s, step, tuning).tolist() == pytest.approx(expected)
    assert consistency.ratio(s, 0, Tuning(q=256, k=0)).tolist() == pytest.approx([255 / 256] * 3)


@pytest.mark.parametrize("path", [FLOW, COSINE], ids=["flow", "cosine"])
def test_the_earlier_level_has_the_noise_asked_for_and_lies_below(path):
    timesteps, t = Timesteps(path, CPU), batch(path)[2]
    s = consistency.relative_noise(*timesteps.scales(t))
    r = s * torch.tensor([0.0, 0.5, 0.9, 0.999, 0.0], dtype=torch.float64)
    at, alpha, sigma = consistency.earlier(timesteps, t, r)
    assert at.dtype == t.dtype and (at < t).all()
    found = consistency.relative_noise(alpha, sigma)
    assert found.tolist() == pytest.approx(r.tolist(), rel=1e-4 if path is FLOW else 0.02)
    assert [(float(alpha[i]), float(sigma[i]), float(at[i])) for i in (0, 4)] == [(1, 0, 0)] * 2


def test_below_the_first_timestep_of_a_diffusion_path_lies_the_clean_image():
    t = torch.tensor([0, 1])
    timesteps = Timesteps(COSINE, CPU)
    s = consistency.relative_noise(*timesteps.scales(t))
    at, _, sigma = consistency.earlier(timesteps, t, 0.999 * s)  # nearest to t itself
    assert at.tolist() == [0, 0] and sigma[0] == 0 < sigma[1] < s[0] * 1.001


@pytest.mark.parametrize(("path", "prediction"), OF_PATH, ids=["flow", "v"])
def test_without_noise_f_is_the_identity_and_with_a_perfect_output_the_image(path, prediction):
    x0, eps, t = batch(path)
    clean = torch.ones(5), torch.zeros(5)
    assert torch.equal(denoised(prediction, 1e3 * eps, x0, *clean), x0)
    alpha, sigma = (scale.float() for scale in Timesteps(path, CPU).scales(t))
    wide = alpha[:, None, None, None], sigma[:, None, None, None]
    output = eps - x0 if path is FLOW else wide[0] * eps - wide[1] * x0
    assert torch.allclose(denoised(prediction, output, wide[0] * x0 + wide[1] * eps, alpha, sigma), x0, atol=1e-5)


@pytest.mark.parametrize(("path", "prediction"), OF_PATH, ids=["flow", "v"])
def test_losses_by_hand(path, prediction):
    """The loss of the paper, with its weight 1 / (t - r), in NumPy."""
    tuning, timesteps, network = Tuning(d=10), Timesteps(path, CPU), Scaled()
    x0, eps, t = batch(path)
    losses = consistency.losses(network, timesteps, prediction, x0, eps, t, None, 25, tuning)
    (x_r, r, _), (x_t, given, _) = network.seen
    assert torch.equal(given, t)
    for i in range(5):
        levels = [path.level(float(t[i])), path.level(float(r[i]))]  # r > 0 in this stage
        images = []
        for level, seen in zip(levels, (x_t, x_r), strict=True):
            x = level.alpha * x0[i].numpy() + level.sigma * eps[i].numpy()
            assert np.allclose(x, seen[i], atol=1e-5)
            output = 0.3 * x + level.t / 1000
            images.append(x - level.sigma * output if path is FLOW else level.alpha * x - level.sigma * output)
        s, earlier = (level.relative_noise for level in levels)
        aimed = s * (1 - (1 + 8 * math.exp(-s) / (1 + math.exp(-s))) / 8)
        assert earlier == pytest.approx(max(aimed, 0), rel=1e-3 if path is FLOW else 0.05, abs=4e-3)
        error = math.sqrt(np.square(images[0] - images[1]).mean() + tuning.c**2) - tuning.c
        assert float(losses[i].detach()) == pytest.approx(error / (s - earlier), rel=2e-3)


def test_the_gradient_flows_through_the_noisier_level_alone():
    tuning, timesteps = Tuning(d=10), Timesteps(FLOW, CPU)
    x0, eps, t = batch(FLOW)
    network = Scaled()
    consistency.losses(network, timesteps, FLOW_PREDICTION, x0, eps, t, None, 25, tuning).sum().backward()
    (x_r, r, _), _ = network.seen
    student, teacher = Scaled(), copy.deepcopy(Scaled()).requires_grad_(False)
    alpha, sigma = timesteps.scales(t)
    target = x_r - r[:, None, None, None] / 1000 * teacher(x_r, r, None)
    x = alpha[:, None, None, None] * x0 + sigma[:, None, None, None] * eps
    f = x - sigma[:, None, None, None] * student(x, t, None)
    weights = 1 / (sigma / alpha - r / (1000 - r))
    (weights * consistency.pseudo_huber(f - target, tuning.c)).sum().backward()
    assert network.w.grad == pytest.approx(float(student.w.grad), rel=1e-3)
    assert not network.seen[0][2].requires_grad and network.seen[1][2].requires_grad


def test_both_levels_have_the_same_dropout_and_the_next_forward_another():
    network = Scaled(dropout=0.5)
    torch.manual_seed(0)
    for _ in range(2):
        consistency.losses(network, Timesteps(FLOW, CPU), FLOW_PREDICTION, *batch(FLOW), None, 500, Tuning(d=100))
    masks = [output != 0 for _, _, output in network.seen]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])


def test_pure_noise_has_a_finite_loss():
    timesteps = Timesteps(path_of("cosine", 1000, zero_terminal_snr=True), CPU)
    x0, eps, t = batch(COSINE)
    t[-1] = 999
    assert timesteps.scales(t)[0][-1] == 0
    losses = consistency.losses(Scaled(), timesteps, "v_prediction", x0, eps, t, None, 900, Tuning(d=100))
    assert losses.isfinite().all()


class Linear(nn.Module):
    """v = a[t] x, with a number for each timestep."""

    def __init__(self, timesteps):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(timesteps))

    def forward(self, x, t, _):
        return self.a[t][:, None, None, None] * x


def test_tuning_finds_the_consistency_function_of_gaussian_data():
    """For x0 ~ N(0, v) the trajectories are x sqrt(v) / sqrt(alpha^2 v + sigma^2), which the denoiser E[x0 | x] misses.

    With a finite gap, f(x_t) = E[f(x_r) | x_t] exactly: f = c[t] x, c[t] = c[r] E[x_r | x_t] / x_t.
    """
    total, variance = 16, 0.25
    path = path_of("cosine", total)
    timesteps, network = Timesteps(path, CPU), Linear(total)
    tuning = Tuning(q=8, d=150)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    steps = 1000
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / steps)
        x0, eps = (torch.randn((64, 1, 8, 8), generator=generator) for _ in range(2))
        t = torch.arange(64) % total
        optimizer.zero_grad()
        at = min(step, 3 * tuning.d)  # the last stages differ in nothing: r is the timestep below t
        losses = consistency.losses(network, timesteps, "v_prediction", variance**0.5 * x0, eps, t, None, at, tuning)
        losses.mean().backward()
        optimizer.step()
    levels = [path.level(t) for t in range(total)]
    found = [level.alpha - level.sigma * float(a) for level, a in zip(levels, network.a.detach(), strict=True)]
    expected, previous = [], (1.0, CLEAN)
    for level in levels:
        c, below = previous
        mean = (below.alpha * level.alpha * variance + below.sigma * level.sigma) / _variance(level, variance)
        previous = c * mean, level
        expected.append(c * mean)
    assert found == pytest.approx(expected, abs=0.02)
    exact = [math.sqrt(variance / _variance(level, variance)) for level in levels]
    denoiser = [level.alpha * variance / _variance(level, variance) for level in levels]
    middle = total // 2
    assert abs(found[middle] - exact[middle]) < 0.2 * abs(denoiser[middle] - exact[middle])


def _variance(level: Level, variance: float) -> float:
    return level.alpha**2 * variance + level.sigma**2


def test_levels_of_the_sampler():
    flow = SchedulerConfig(FLOW, FLOW_PREDICTION).levels("consistency", 4)
    noise = [3 * 0.821, 0.821, 0.821 / 3]
    assert [level.relative_noise for level in flow] == pytest.approx([math.inf, *noise])
    assert [level.t for level in SchedulerConfig(FLOW, FLOW_PREDICTION).levels("consistency", 1)] == [1000]
    shifted = SchedulerConfig(RectifiedFlow(1000, 3.0), FLOW_PREDICTION).levels("consistency", 2)
    assert shifted[1].relative_noise == pytest.approx(3 * 0.821)
    cosine = SchedulerConfig(COSINE, "v_prediction").levels("consistency", 4)
    assert cosine[0].t == 999
    assert [level.relative_noise for level in cosine[1:]] == pytest.approx(noise, rel=0.005)
    for path in (FLOW, DiffusionPath([0.9, 0.5])):
        with pytest.raises(ValueError, match="sampling steps 0 must"):
            SchedulerConfig(path, "v_prediction").levels("consistency", 0)
    with pytest.raises(ValueError, match="sampling steps 3 must lie between 1 and the model's 2"):
        SchedulerConfig(DiffusionPath([0.9, 0.5]), "v_prediction").levels("consistency", 3)


@pytest.mark.parametrize(("path", "prediction"), OF_PATH, ids=["flow", "v"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_sampler_with_the_consistency_function_of_gaussian_data_draws_the_data(path, prediction, steps):
    variance, rng = 0.25, np.random.default_rng(0)

    def noise():
        return rng.standard_normal(40_000)

    seen = []

    def denoise(x, level):
        seen.append((x, level))
        return math.sqrt(variance / _variance(level, variance)) * x

    scheduler = SchedulerConfig(path, prediction, clip_sample=False)
    drawn = samplers.sample(denoise, noise, scheduler, Sampling("consistency", steps))
    assert len(seen) == steps
    assert drawn.std() == pytest.approx(math.sqrt(variance), rel=0.02)
    for x, level in seen:  # the marginals of the path, too
        assert x.std() == pytest.approx(math.sqrt(_variance(level, variance)), rel=0.02)
