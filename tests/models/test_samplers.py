"""Samplers: against diffusers' schedulers, against a problem with a known solution, and per-image seeds."""

import math

import numpy as np
import pytest
import torch

from models.noise import paths, samplers, schedules
from models.noise.paths import CLEAN, DiffusionPath, Level
from models.noise.samplers import Sampling, SchedulerConfig
from models.noise.spacing import leading_timesteps, timesteps_for, trailing_timesteps
from models.optimization.diffusion import add_noise, drop_condition, loss_weights, squared_error, target

T = 1000
ALPHA_BAR = schedules.alpha_bar(schedules.betas("linear", T))
SHAPE = (2, 1, 8, 8)


def at(a, t=0):
    """The noise level with this alpha_bar."""
    return Level(t, math.sqrt(a), math.sqrt(1 - a))


def scales(a):
    """Return alpha and sigma for alpha_bar, a tensor."""
    return a.sqrt(), (1 - a).sqrt()


def drawn_by(sampler, steps, denoise, noise, levels=ALPHA_BAR):
    return samplers.sample(denoise, noise, SchedulerConfig(DiffusionPath(levels), "sample"), Sampling(sampler, steps))


def x0_of(x, t):
    """A fixed smooth 'network' that depends on x and t; its clean image stays within [-1, 1]."""
    return 0.8 * torch.tanh(x + math.sin(t / 100))


def output_of(prediction, x, t, levels):
    """What that network would say in the parametrisation `prediction`."""
    a, x0 = torch.tensor(levels[t]), x0_of(x, t)
    eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
    return target(prediction, x0, eps, *scales(a[None])).float()


def scheduler_for(sampler, levels_of, prediction, spacing="trailing", offset=0):
    import diffusers

    shared = {"num_train_timesteps": T, "timestep_spacing": spacing, "prediction_type": prediction, **levels_of}
    shared |= {"steps_offset": offset}
    if sampler == "ddpm":
        return diffusers.DDPMScheduler(**shared, clip_sample=True)
    if sampler == "ddpm large":
        return diffusers.DDPMScheduler(**shared, clip_sample=True, variance_type="fixed_large")
    if sampler.startswith("ddim"):
        return diffusers.DDIMScheduler(**shared, clip_sample=True)
    if sampler == "euler_ancestral":
        return diffusers.EulerAncestralDiscreteScheduler(**shared)
    return diffusers.DPMSolverMultistepScheduler(**shared, algorithm_type="dpmsolver++", solver_order=2)


STEPS = {"ddpm": 100, "ddim": 50, "ddim eta 0.5": 50, "ddim eta 1": 50}
STEPS |= {"euler_ancestral": 100, "dpm_solver_pp_2m": 20}
OPTIONS = {"ddim eta 0.5": {"eta": 0.5}, "ddim eta 1": {"eta": 1.0}, "ddpm large": {"variance_type": "fixed_large"}}
MODULES = {"ddpm": "ddpm", "ddim": "ddim", "euler": "euler_ancestral_discrete", "dpm": "dpmsolver_multistep"}


def trajectory_of_diffusers(scheduler, sampler, output, draws, monkeypatch):
    """Return x after each step of a diffusers scheduler that receives our noise, scaled to variance 1."""
    fed = iter(draws[1:])
    name = MODULES[sampler.split()[0].split("_")[0]]
    monkeypatch.setattr(f"diffusers.schedulers.scheduling_{name}.randn_tensor", lambda *_, **__: next(fed))
    options = {**OPTIONS, "ddpm large": {}}.get(sampler, {})
    if sampler.startswith("ddim"):
        options = {**options, "use_clipped_model_output": True}
    seen, x = [], draws[0]
    if sampler == "euler_ancestral":  # its x is in units where the signal alone has variance 1
        x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    for i, t in enumerate(scheduler.timesteps):
        entering = scheduler.scale_model_input(x, t)
        x = scheduler.step(output(entering, int(t)), t, x, **options).prev_sample
        seen.append(x / (scheduler.sigmas[i + 1] ** 2 + 1) ** 0.5 if sampler == "euler_ancestral" else x)
    return seen


def largest_difference(sampler, prediction, levels, levels_of, monkeypatch, steps=None, spacing="trailing", offset=0):
    scheduler = scheduler_for(sampler, levels_of, prediction, spacing, offset)
    steps = steps or STEPS[sampler]
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(SHAPE, generator=generator) for _ in range(steps + 1)]
    expected = trajectory_of_diffusers(
        scheduler, sampler, lambda x, t: output_of(prediction, x, t, levels), draws, monkeypatch
    )
    ours, noise = [], iter(draws[1:])
    path = DiffusionPath(levels)
    chosen = timesteps_for(sampler.split()[0], T, steps, spacing, offset)
    assert [int(t) for t in scheduler.timesteps] == chosen
    samplers.SAMPLERS[sampler.split()[0]](
        samplers.denoiser(lambda x, t, _: output_of(prediction, x, t, levels), SchedulerConfig(path, prediction)),
        draws[0],
        lambda: next(noise),
        [*map(path.level, chosen), CLEAN],
        lambda i, t, x, x0: ours.append(x),
        **OPTIONS.get(sampler, {}),
    )
    assert ours[0].dtype == expected[0].dtype == torch.float32
    return max(float((a - b).abs().max()) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
@pytest.mark.parametrize("sampler", STEPS)
def test_whole_trajectory_equals_diffusers(sampler, schedule, prediction, monkeypatch):
    if (sampler, prediction) == ("euler_ancestral", "sample"):
        pytest.skip("diffusers' Euler ancestral scheduler does not know x0 prediction")
    betas = schedules.betas(schedule, T)
    levels = schedules.alpha_bar(betas)
    limit = 1e-4
    if (sampler, schedule, prediction) == ("dpm_solver_pp_2m", "cosine", "epsilon"):
        # One rounding of eps in float32 moves x0 by 1.2e-3 at this alpha_bar, and diffusers rounds once more.
        limit = 2**-24 / math.sqrt(levels[-1])
    assert largest_difference(sampler, prediction, levels, {"trained_betas": betas.tolist()}, monkeypatch) < limit


@pytest.mark.parametrize(("steps", "offset"), [(20, 0), (30, 1), (7, 1)])
@pytest.mark.parametrize("sampler", STEPS)
def test_leading_trajectory_equals_diffusers(sampler, steps, offset, monkeypatch):
    """Also where the steps do not divide the timesteps."""
    levels_of = {"beta_schedule": "linear"}
    given = {"steps": steps, "spacing": "leading", "offset": offset}
    assert largest_difference(sampler, "v_prediction", ALPHA_BAR, levels_of, monkeypatch, **given) < 1e-4


@pytest.mark.parametrize("sampler", ["ddpm", "ddpm large"])
def test_all_thousand_steps_of_the_paper_equal_diffusers(sampler, monkeypatch):
    levels_of = {"beta_schedule": "linear"}
    assert largest_difference(sampler, "epsilon", ALPHA_BAR, levels_of, monkeypatch, steps=1000) < 1e-4


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
@pytest.mark.parametrize("sampler", STEPS)
def test_whole_trajectory_from_pure_noise_equals_diffusers(sampler, prediction, monkeypatch):
    """Zero terminal SNR; two of diffusers' schedulers take 2^-24 in the place of the last alpha_bar, 0."""
    if (sampler, prediction) == ("euler_ancestral", "sample"):
        pytest.skip("diffusers' Euler ancestral scheduler does not know x0 prediction")
    levels = schedules.alpha_bar(schedules.betas("linear", T, zero_terminal_snr=True))
    if sampler in ("euler_ancestral", "dpm_solver_pp_2m"):
        levels[-1] = 2**-24
    levels_of = {"beta_schedule": "linear", "rescale_betas_zero_snr": True}
    assert largest_difference(sampler, prediction, levels, levels_of, monkeypatch) < 1e-4


@pytest.mark.parametrize("sampler", samplers.OF_DIFFUSION)
def test_pure_noise_is_the_limit_of_almost_pure_noise(sampler):
    def draw(last):
        levels = schedules.alpha_bar(schedules.betas("cosine", T, zero_terminal_snr=True))
        assert levels[-1] == 0
        levels[-1] = last
        noise = samplers.SeededNoise([1, 2], (1, 8, 8))
        return drawn_by(sampler, 12, lambda x, t: 0.8 * np.tanh(x), noise, levels)

    assert np.isfinite(draw(0.0)).all()
    assert np.abs(draw(0.0) - draw(1e-14)).max() < 1e-4


@pytest.mark.parametrize("total", [100, 500, 777, 1000])
def test_timesteps_are_those_of_diffusers(total):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(total, timestep_spacing="trailing")
    for steps in (1, 2, 10, 15, 20, 50, total):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == trailing_timesteps(total, steps)


def exact_gaussian(x, a_from, a_to, variance):
    """Solution of the probability-flow ODE for data N(0, variance): x scales with its own deviation."""
    return x * math.sqrt((a_to * variance + 1 - a_to) / (a_from * variance + 1 - a_from))


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm_solver_pp_2m", 2)])
def test_order_of_convergence(sampler, order):
    """Halving the step divides the error by 2^order, on the ODE of Gaussian data with a known solution."""
    variance = 0.3
    timesteps = np.array(trailing_timesteps(T, T))
    levels = schedules.alpha_bar(schedules.betas("cosine", T))

    def denoise(x, level):  # E[x_0 | x_t] for Gaussian data
        a = level.alpha**2
        return math.sqrt(a) * variance / (a * variance + 1 - a) * x

    def error(stride):
        chosen = timesteps[50:951:stride]
        seen = []
        samplers.SAMPLERS[sampler](
            denoise,
            np.ones(1),
            lambda: np.zeros(1),
            [*(at(levels[t]) for t in chosen), CLEAN],
            lambda i, t, x, x0: seen.append(x),
        )
        # the step that leaves the last chosen timestep goes to a clean image; compare where it starts
        return abs(seen[-2] - exact_gaussian(1.0, levels[chosen[0]], levels[chosen[-1]], variance))[0]

    assert math.log2(error(60) / error(30)) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler_ancestral"])
def test_order_of_convergence_with_fresh_noise(sampler):
    """Halving the step halves the error of the variance: weak order 1, on Gaussian data where all variances are known.

    Every step is linear, so x is followed exactly as its coefficients on independent unit normals.
    """
    variance = 0.3
    levels = schedules.alpha_bar(schedules.betas("cosine", T))

    def denoise(x, level):
        a = level.alpha**2
        return math.sqrt(a) * variance / (a * variance + 1 - a) * x

    def error(stride):
        chosen, seen = np.arange(949, 49, -stride), []
        fresh = iter(np.eye(len(chosen) + 1))
        options = {"eta": 1.0} if sampler == "ddim" else {}
        x = math.sqrt(levels[chosen[0]] * variance + 1 - levels[chosen[0]]) * next(fresh)
        samplers.SAMPLERS[sampler](
            denoise,
            x,
            lambda: next(fresh),
            [*(at(levels[t]) for t in chosen), CLEAN],
            lambda i, t, x, x0: seen.append(x),
            **options,
        )
        wanted = levels[chosen[-1]] * variance + 1 - levels[chosen[-1]]
        return abs((seen[-2] ** 2).sum() - wanted)

    # 899 = 29 * 31 steps separate the first timestep from the last whatever the stride
    assert math.log2(error(60) / error(30)) == pytest.approx(1, abs=0.35)


@pytest.mark.parametrize("sampler", samplers.OF_DIFFUSION)
def test_perfect_denoiser_gives_the_image(sampler):
    image = np.linspace(-1, 1, 64).reshape(1, 1, 8, 8).astype(np.float32)
    noise = samplers.SeededNoise([3], (1, 8, 8))
    drawn = drawn_by(sampler, 25, lambda x, t: image, noise)
    assert np.abs(drawn - image).max() < 1e-5


@pytest.mark.parametrize("sampler", samplers.OF_DIFFUSION)
def test_torch_and_numpy_agree(sampler):
    def draw(convert):
        noise = samplers.SeededNoise([1, 2], (1, 8, 8))
        return drawn_by(sampler, 20, lambda x, t: x.clip(-1, 1), lambda: convert(noise()))

    assert np.abs(draw(torch.from_numpy).numpy() - draw(lambda a: a)).max() < 1e-5


def test_image_depends_on_its_own_seed_alone():
    alone = samplers.SeededNoise([5], (1, 8, 8))
    among = samplers.SeededNoise([4, 5, 6], (1, 8, 8))
    for _ in range(3):
        assert np.array_equal(alone()[0], among()[1])
    assert not np.array_equal(among()[0], among()[1])


def test_guidance_moves_away_from_the_null_condition():
    scheduler = SchedulerConfig(DiffusionPath(ALPHA_BAR), "epsilon")
    denoise = samplers.denoiser(lambda x, t, c: 0 * x + c, scheduler, Sampling(guidance_scale=3.0), 0.2, 0.1)
    x, a = np.zeros((1, 1, 2, 2)), ALPHA_BAR[100]
    assert denoise(x, at(a)) == pytest.approx(-math.sqrt(1 - a) * (0.1 + 3 * 0.1) / math.sqrt(a))


@pytest.mark.parametrize("condition", [0.2, None])
def test_autoguidance_moves_away_from_the_guide_at_the_same_condition(condition):
    """Karras et al. 2024b, eq. 3, of constant outputs: g + w (c - g)."""
    asked = []

    def guide(x, t, condition):
        asked.append(condition)
        return 0 * x + 0.1

    scheduler = SchedulerConfig(DiffusionPath(ALPHA_BAR), "sample")
    sampling = Sampling(guidance_scale=3.0, guidance="auto")
    denoise = samplers.denoiser(lambda x, t, c: 0 * x + 0.3, scheduler, sampling, condition, 0.9, guide)
    assert denoise(np.zeros((1, 1, 2, 2)), at(ALPHA_BAR[100])) == pytest.approx(0.1 + 3 * (0.3 - 0.1))
    assert asked == [condition]


def test_guidance_that_a_model_does_not_have_is_refused():
    scheduler = SchedulerConfig(DiffusionPath(ALPHA_BAR), "sample")
    auto = Sampling(guidance_scale=3.0, guidance="auto")
    with pytest.raises(ValueError, match=r"has no guide for guidance 'auto'; train it with train\.guide_step"):
        samplers.denoiser(lambda x, t, c: x, scheduler, auto, 0.2, 0.1)
    with pytest.raises(ValueError, match="classifier-free guidance needs a conditional model"):
        samplers.denoiser(lambda x, t, c: x, scheduler, Sampling(guidance_scale=3.0), None, None, lambda x, t, c: x)
    with pytest.raises(ValueError, match="unknown guidance 'self'; known: classifier_free, auto"):
        Sampling(guidance="self")


@pytest.mark.parametrize(("kind", "reference"), [("classifier_free", 0.1), ("auto", "guide")])
def test_guidance_is_kept_to_its_noise_levels(kind, reference):
    """Inside (low, high] the guided x0 and two evaluations, outside the plain x0 and one."""
    asked = []

    def guide(x, t, condition):
        asked.append("guide")
        return 0 * x + condition / 2

    def predict(x, t, condition):
        asked.append(condition)
        return 0 * x + condition

    sampling = Sampling(guidance_scale=3.0, guidance_interval=(0.5, 3.0), guidance=kind)
    scheduler = SchedulerConfig(DiffusionPath([0.9, 0.5, 0.1, 0.0]), "sample")
    denoise = samplers.denoiser(predict, scheduler, sampling, 0.2, 0.1, guide)
    sigmas = [1 / 3, 1.0, 3.0, math.inf]
    drawn = [float(denoise(np.zeros((1, 1, 1, 1)), scheduler.path.level(t))[0, 0, 0, 0]) for t in range(4)]
    assert drawn == pytest.approx([0.4 if 0.5 < sigma <= 3.0 else 0.2 for sigma in sigmas])
    assert asked == [0.2, 0.2, reference, 0.2, reference, 0.2]


@pytest.mark.parametrize("interval", [(1.0, 1.0), (2.0, 1.0), (1.0,)])
def test_an_empty_interval_of_guidance_is_refused(interval):
    with pytest.raises(ValueError, match="is not two noise levels"):
        Sampling(guidance_scale=3.0, guidance_interval=interval)


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 1.1), ("ddim", -0.1), ("ddpm", 0.5)])
def test_an_eta_that_the_sampler_does_not_have_is_refused(sampler, eta):
    with pytest.raises(ValueError, match="it is 0 to 1 for 'ddim' and 0 for the others"):
        Sampling(sampler, 5, eta)


@pytest.mark.parametrize("steps", [0, T + 1])
def test_impossible_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"{steps} must lie between 1 and the model's 1000"):
        trailing_timesteps(T, steps)
    with pytest.raises(ValueError, match="sampling steps"):
        leading_timesteps(T, steps)


def test_leading_steps_that_begin_beyond_the_last_timestep_are_refused():
    assert leading_timesteps(T, T)[0] == T - 1
    with pytest.raises(ValueError, match="take fewer"):
        leading_timesteps(T, T, offset=1)
    with pytest.raises(ValueError, match="known: trailing, leading"):
        timesteps_for("ddim", T, 10, "linspace")


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("t", [0, 300, 900])
def test_target_and_x0_are_inverse(prediction, t):
    torch.manual_seed(0)
    x0, eps = torch.rand(SHAPE) * 2 - 1, torch.randn(SHAPE)
    a = torch.full((2,), ALPHA_BAR[t], dtype=torch.float32)
    output, x = target(prediction, x0, eps, *scales(a)), add_noise(x0, eps, *scales(a))
    assert torch.allclose(paths.to_x0(prediction, output, x, at(ALPHA_BAR[t])), x0, atol=1e-5)


def test_targets_in_numbers():
    """For a = 0.64, sqrt(a) = 0.8 and sqrt(1 - a) = 0.6."""
    x0, eps, a = torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), -1.0), torch.tensor([0.64])
    assert add_noise(x0, eps, *scales(a)).item() == pytest.approx(0.8 * 0.5 - 0.6)
    assert target("epsilon", x0, eps, *scales(a)).item() == -1
    assert target("sample", x0, eps, *scales(a)).item() == 0.5
    assert target("v_prediction", x0, eps, *scales(a)).item() == pytest.approx(-0.8 - 0.6 * 0.5)


def test_the_image_in_pure_noise_follows_from_v_and_x0_alone():
    x, output = np.ones((1, 1, 1, 1)), np.full((1, 1, 1, 1), 0.25)
    assert paths.to_x0("sample", output, x, at(0.0)) == 0.25
    assert paths.to_x0("v_prediction", output, x, at(0.0)) == -0.25
    with pytest.raises(ValueError, match="undefined at alpha_bar 0"):
        paths.to_x0("epsilon", output, x, at(0.0))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_min_snr_weighs_the_error_of_x0(prediction):
    """Whatever the network predicts, its weighted error is min(SNR, gamma) times the error of x0."""
    torch.manual_seed(0)
    levels = torch.tensor(ALPHA_BAR)
    snr, gamma = levels / (1 - levels), 5.0
    t = torch.tensor([0, 10, 100, 500, 999])
    assert snr[t[0]] > gamma > snr[t[3]]
    a = levels[t]
    x0, wrong, eps = torch.rand(3, 5, 1, 4, 4, dtype=torch.float64)
    x = add_noise(x0, eps, *scales(a))
    # the output of a network that takes `wrong` for the image in x
    wide = a[:, None, None, None]
    output = target(prediction, wrong, (x - wide.sqrt() * wrong) / (1 - wide).sqrt(), *scales(a))
    error = (output - target(prediction, x0, eps, *scales(a))).square().mean(dim=(1, 2, 3))
    of_x0 = (wrong - x0).square().mean(dim=(1, 2, 3))
    weighted = loss_weights("min_snr", prediction, *scales(levels), gamma)[t] * error
    assert torch.allclose(weighted, snr[t].clamp(max=gamma) * of_x0, rtol=1e-5)


def test_weights_in_numbers():
    """SNR 1/9, 1, 4, 9 with gamma 5."""
    levels = torch.tensor([0.1, 0.5, 0.8, 0.9], dtype=torch.float64)
    assert loss_weights("plain", "epsilon", *scales(levels), 5.0).tolist() == [1, 1, 1, 1]
    expected = {"epsilon": [1, 1, 1, 5 / 9], "sample": [1 / 9, 1, 4, 5], "v_prediction": [0.1, 0.5, 0.8, 0.5]}
    for prediction, weights in expected.items():
        assert loss_weights("min_snr", prediction, *scales(levels), 5.0).tolist() == pytest.approx(weights)
    with pytest.raises(ValueError, match="unknown weighting 'snr'"):
        loss_weights("snr", "epsilon", *scales(levels), 5.0)
    with pytest.raises(ValueError, match="unknown prediction 'noise'"):
        loss_weights("min_snr", "noise", *scales(levels), 5.0)


def test_noising_keeps_unit_variance():
    torch.manual_seed(0)
    noised = add_noise(torch.randn(64, 3, 16, 16), torch.randn(64, 3, 16, 16), *scales(torch.linspace(0.01, 0.99, 64)))
    assert noised.var().item() == pytest.approx(1, abs=0.02)


def test_squared_error_is_per_sample():
    output = torch.stack([torch.zeros(1, 2, 2), torch.full((1, 2, 2), 3.0)])
    assert squared_error(output, torch.zeros(2, 1, 2, 2)).tolist() == [0, 9]


def test_dropped_conditions_become_null():
    dropped = torch.tensor([True, False, True])
    assert drop_condition(torch.tensor([1, 2, 3]), torch.tensor(10), dropped).tolist() == [10, 2, 10]
    embeddings = drop_condition(torch.ones(3, 4), torch.zeros(4), dropped)
    assert embeddings.sum(dim=1).tolist() == [0, 4, 0]
