"""Samplers: against diffusers' schedulers, against a problem with a known solution, and per-image seeds."""

import math

import numpy as np
import pytest
import torch

from models import samplers, schedules
from models.diffusion import add_noise, drop_condition, squared_error, target

T = 1000
ALPHA_BAR = schedules.alpha_bar(schedules.betas("linear", T))
SHAPE = (2, 1, 8, 8)


def network(x, t):
    """A fixed smooth 'network' that depends on x and t, small enough to keep x_0 within [-1, 1]."""
    return 0.3 * torch.tanh(x) + 0.1 * math.sin(t / 100)


def scheduler_for(sampler):
    import diffusers

    shared = {"num_train_timesteps": T, "beta_schedule": "linear", "timestep_spacing": "trailing"}
    if sampler == "ddpm":
        return diffusers.DDPMScheduler(**shared, clip_sample=False, variance_type="fixed_small")
    if sampler == "ddim":
        return diffusers.DDIMScheduler(**shared, clip_sample=False, set_alpha_to_one=True)
    return diffusers.DPMSolverMultistepScheduler(
        **shared, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero", lower_order_final=False
    )


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 1000), ("ddim", 50), ("dpm_solver_pp_2m", 20)])
def test_whole_trajectory_equals_diffusers(sampler, steps, monkeypatch):
    scheduler = scheduler_for(sampler)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(SHAPE, generator=generator) for _ in range(steps + 1)]
    x = theirs = draws[0]
    fed = iter(draws[1:])
    # diffusers draws its own noise; give it ours, in the same order
    import diffusers.schedulers.scheduling_ddpm as module

    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(fed))
    expected = []
    for t in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, int(t)), t, theirs).prev_sample
        expected.append(theirs)

    ours = []
    noise = iter(draws[1:])
    samplers.SAMPLERS[sampler](
        lambda x, t: samplers.to_x0("epsilon", network(x, t), x, ALPHA_BAR[t]),
        x,
        lambda: next(noise),
        ALPHA_BAR,
        samplers.trailing_timesteps(T, steps),
        lambda i, t, x, x0: ours.append(x),
    )
    assert [int(t) for t in scheduler.timesteps] == samplers.trailing_timesteps(T, steps)
    # v_0 of the last steps is what is left of x_T after a division by alpha_bar: scale before comparing
    scale = max(1.0, max(float(e.abs().max()) for e in expected))
    assert max(float((a - b).abs().max()) for a, b in zip(ours, expected, strict=True)) < 1e-4 * scale


def exact_gaussian(x, a_from, a_to, variance):
    """Solution of the probability-flow ODE for data N(0, variance): x scales with its own deviation."""
    return x * math.sqrt((a_to * variance + 1 - a_to) / (a_from * variance + 1 - a_from))


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm_solver_pp_2m", 2)])
def test_order_of_convergence(sampler, order):
    """Halving the step divides the error by 2^order, on the ODE of Gaussian data with a known solution."""
    variance = 0.3
    timesteps = np.array(samplers.trailing_timesteps(T, T))
    levels = schedules.alpha_bar(schedules.betas("cosine", T))

    def denoise(x, t):  # E[x_0 | x_t] for Gaussian data
        a = levels[t]
        return math.sqrt(a) * variance / (a * variance + 1 - a) * x

    def error(stride):
        chosen = timesteps[50:951:stride]
        seen = []
        samplers.SAMPLERS[sampler](
            denoise, np.ones(1), lambda: np.zeros(1), levels, chosen, lambda i, t, x, x0: seen.append(x)
        )
        # the step that leaves the last chosen timestep goes to a clean image; compare where it starts
        return abs(seen[-2] - exact_gaussian(1.0, levels[chosen[0]], levels[chosen[-1]], variance))[0]

    assert math.log2(error(60) / error(30)) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_perfect_denoiser_gives_the_image(sampler):
    image = np.linspace(-1, 1, 64).reshape(1, 1, 8, 8).astype(np.float32)
    noise = samplers.SeededNoise([3], (1, 8, 8))
    drawn = samplers.sample(sampler, lambda x, t: image, noise, ALPHA_BAR, 25)
    assert np.abs(drawn - image).max() < 1e-5


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_torch_and_numpy_agree(sampler):
    def draw(convert):
        noise = samplers.SeededNoise([1, 2], (1, 8, 8))
        return samplers.sample(sampler, lambda x, t: x.clip(-1, 1), lambda: convert(noise()), ALPHA_BAR, 20)

    assert np.abs(draw(torch.from_numpy).numpy() - draw(lambda a: a)).max() < 1e-5


def test_image_depends_on_its_own_seed_alone():
    alone = samplers.SeededNoise([5], (1, 8, 8))
    among = samplers.SeededNoise([4, 5, 6], (1, 8, 8))
    for _ in range(3):
        assert np.array_equal(alone()[0], among()[1])
    assert not np.array_equal(among()[0], among()[1])


def test_guidance_moves_away_from_the_null_condition():
    denoise = samplers.denoiser(lambda x, t, c: 0 * x + c, "epsilon", ALPHA_BAR, 0.2, 0.1, guidance_scale=3.0)
    x, a = np.zeros((1, 1, 2, 2)), ALPHA_BAR[100]
    assert denoise(x, 100) == pytest.approx(-math.sqrt(1 - a) * (0.1 + 3 * 0.1) / math.sqrt(a))


@pytest.mark.parametrize("steps", [0, T + 1])
def test_impossible_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"{steps} must lie between 1 and the model's 1000"):
        samplers.trailing_timesteps(T, steps)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_target_and_x0_are_inverse(prediction):
    torch.manual_seed(0)
    x0, eps, t = torch.rand(SHAPE) * 2 - 1, torch.randn(SHAPE), 300
    a = torch.full((2,), ALPHA_BAR[t], dtype=torch.float32)
    output = target(prediction, x0, eps, a)
    assert torch.allclose(samplers.to_x0(prediction, output, add_noise(x0, eps, a), ALPHA_BAR[t]), x0, atol=1e-5)


def test_noising_keeps_unit_variance():
    torch.manual_seed(0)
    noised = add_noise(torch.randn(64, 3, 16, 16), torch.randn(64, 3, 16, 16), torch.linspace(0.01, 0.99, 64))
    assert noised.var().item() == pytest.approx(1, abs=0.02)


def test_squared_error_is_per_sample():
    output = torch.stack([torch.zeros(1, 2, 2), torch.full((1, 2, 2), 3.0)])
    assert squared_error(output, torch.zeros(2, 1, 2, 2)).tolist() == [0, 9]


def test_dropped_conditions_become_null():
    dropped = torch.tensor([True, False, True])
    assert drop_condition(torch.tensor([1, 2, 3]), torch.tensor(10), dropped).tolist() == [10, 2, 10]
    embeddings = drop_condition(torch.ones(3, 4), torch.zeros(4), dropped)
    assert embeddings.sum(dim=1).tolist() == [0, 4, 0]
