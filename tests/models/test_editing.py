"""Image-to-image and inpainting: against diffusers step by step, RePaint's order of steps, masks and compositing."""

import math

import numpy as np
import pytest

from models.noise import editing, samplers, schedules
from models.noise.editing import Start
from models.noise.paths import FLOW_PREDICTION, DiffusionPath, RectifiedFlow
from models.noise.samplers import OF_DIFFUSION, OF_FLOW, Sampling, SchedulerConfig, SeededNoise

SHAPE = (2, 1, 8, 8)
DIFFUSION = SchedulerConfig(DiffusionPath(schedules.alpha_bar(schedules.betas("cosine", 100))), "sample")
FLOW = SchedulerConfig(RectifiedFlow(), FLOW_PREDICTION, clip_sample=False)
BOTH = [(DIFFUSION, name) for name in OF_DIFFUSION] + [(FLOW, name) for name in OF_FLOW]
IMAGE = np.linspace(-1, 1, 128, dtype=np.float32).reshape(SHAPE)
LEFT = np.zeros((2, 1, 8, 8), np.float32)
LEFT[..., :4] = 1


def drawn(scheduler, sampler, start=None, steps=10, seen=None, seeds=(1, 2)):
    """Sample with a fixed smooth network; `seen` collects (i, t, x)."""

    def denoise(x, level):
        return 0.8 * np.tanh(x + math.sin(level.t / 100))

    def callback(i, t, x, x0):
        if seen is not None:
            seen.append((i, t, x))
        return "ignored"

    noise = SeededNoise(seeds, SHAPE[1:])
    return samplers.sample(denoise, noise, scheduler, Sampling(sampler, steps), callback, start)


@pytest.mark.parametrize(("scheduler", "sampler"), BOTH)
def test_every_sampler_begins_at_the_level_of_the_strength_and_keeps_the_known_region(scheduler, sampler):
    every, seen = [], []
    drawn(scheduler, sampler, seen=every)
    result = drawn(scheduler, sampler, Start(IMAGE, 0.55, LEFT), seen=seen)
    assert [i for i, _, _ in seen] == list(range(5))  # int(10 * 0.55), rounded down
    assert [t for _, t, _ in seen] == [t for _, t, _ in every[5:]]
    assert np.array_equal(result[..., 4:], IMAGE[..., 4:])
    assert not np.allclose(result[..., :4], IMAGE[..., :4], atol=0.1)
    levels = [*scheduler.levels(sampler, 10), None][6:]
    eps = SeededNoise((1, 2), SHAPE[1:])()
    for (_, _, x), level in zip(seen[:-1], levels[:-1], strict=True):
        assert np.allclose(x[..., 4:], (level.alpha * IMAGE + level.sigma * eps)[..., 4:], atol=1e-6)


@pytest.mark.parametrize(("scheduler", "sampler"), BOTH)
def test_a_full_mask_at_strength_1_is_plain_sampling(scheduler, sampler):
    start = Start(IMAGE, 1.0, np.ones_like(LEFT))
    assert np.array_equal(drawn(scheduler, sampler, start), drawn(scheduler, sampler))


def test_strength_1_without_a_mask_begins_at_the_noised_image():
    seen, level = [], DIFFUSION.levels("ddim", 10)[0]
    assert level.alpha > 0
    start = Start(100 * IMAGE)  # far outside the noise

    def denoise(x, level):
        seen.append(x)
        return x

    noise = SeededNoise((1, 2), SHAPE[1:])
    samplers.sample(denoise, noise, DIFFUSION, Sampling("ddim", 10), start=start)
    eps = SeededNoise((1, 2), SHAPE[1:])()
    assert np.allclose(seen[0], level.alpha * 100 * IMAGE + level.sigma * eps, atol=1e-5)


def order_of_the_authors(steps, jump, resampling):
    """`get_schedule_jump` of the code of RePaint: states visited, counted from -1, the clean image."""
    jumps = dict.fromkeys(range(0, steps - jump, jump), resampling - 1)
    t, visited = steps, []
    while t >= 1:
        t -= 1
        visited.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            t += jump
            visited.append(t)
    return [*visited, -1]


@pytest.mark.parametrize("order", [(4, 1, 2), (5, 2, 2), (6, 2, 3), (20, 5, 4), (3, 1, 1), (4, 10, 5)])
def test_the_order_of_steps_is_that_of_repaint(order):
    visited = []
    for first, end in editing.stretches(*order):
        states = [order[0] - 1 - index for index in range(first, end + 1)]
        visited += states[1:] if visited[-1:] == states[:1] else states
    assert visited == order_of_the_authors(*order)


@pytest.mark.parametrize(("scheduler", "sampler"), BOTH)
def test_resampling_repeats_steps_with_fresh_noise_and_keeps_the_known_region(scheduler, sampler):
    seen = []
    result = drawn(scheduler, sampler, Start(IMAGE, 0.6, LEFT, resampling=3, jump=2), seen=seen)
    assert [i for i, _, _ in seen] == list(range(len(seen)))
    levels = scheduler.levels(sampler, 10)[4:]
    taken = [k for first, end in editing.stretches(6, 2, 3) for k in range(first, end)]
    assert [t for _, t, _ in seen] == [levels[k].t for k in taken] and len(taken) > 6
    assert np.array_equal(result[..., 4:], IMAGE[..., 4:])
    known = [x[..., 4:] for (_, _, x), k in zip(seen, taken, strict=True) if k == 1]
    assert len(known) > 1 and not np.allclose(known[0], known[1], atol=1e-3)


@pytest.mark.parametrize("scheduler", [DIFFUSION, FLOW])
def test_a_jump_back_has_the_distribution_of_the_noisier_level(scheduler):
    noise = np.random.default_rng(0).standard_normal((2, 100_000))
    levels = scheduler.levels(samplers.samplers_of(scheduler.path)[0], 10)
    level, noisier = levels[6], levels[3]
    x = editing.renoised(editing.noised(0.5, level, noise[0]), level, noisier, noise[1])
    assert x.mean() == pytest.approx(noisier.alpha * 0.5, abs=0.01)
    assert x.std() == pytest.approx(noisier.sigma, abs=0.01)


def test_a_multistep_solver_starts_anew_after_a_jump():
    """Each stretch is a run of its own, without the predictions from before the jump."""
    calls = []

    def run(x, noise, levels, after):
        calls.append(len(levels) - 1)
        for i, level in enumerate(levels[:-1]):
            x = after(i, level.t, x, x)
        return x

    levels = DIFFUSION.levels("dpm_solver_pp_2m", 6)
    editing.sample_from(Start(IMAGE, 1.0, LEFT, 2, 2), run, SeededNoise((1, 2), SHAPE[1:]), [*levels, samplers.CLEAN])
    assert calls == [end - first for first, end in editing.stretches(6, 2, 2)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strength": 0.0}, "strength 0 must lie above 0"),
        ({"strength": 1.2}, "strength 1.2 must lie above 0 and not above 1"),
        ({"strength": 0.05}, r"strength 0.05 takes none of 10 steps; it must be at least 0.1"),
        ({"strength": math.nan}, "strength nan must lie"),
        ({"mask": LEFT[..., :4]}, r"the mask has the shape \(2, 1, 8, 4\); .* \(2, 1, 8, 8\)"),
        ({"resampling": 2}, "give a mask"),
        ({"mask": LEFT, "jump": 0}, "must be at least 1"),
    ],
)
def test_an_impossible_start_is_refused_in_one_sentence(given, message):
    with pytest.raises(ValueError, match=message):
        drawn(DIFFUSION, "ddim", Start(IMAGE, **given))
