"""Samplers as free functions, from the papers, and the two settings objects that they take.

`Sampling` is what a user chooses (sampler, steps, eta, guidance); `SchedulerConfig` is what the trained model
prescribes. Only arithmetic operators touch the images, so the same code runs on torch tensors and on NumPy arrays.
The ONNX bundle contains a copy of this file, so it imports only NumPy.

Legend: `x` is x_t, float [N, C, H, W]; `x0` the predicted clean image of the same shape, about [-1, 1]. `levels` are
the noise levels from that of x down to that of the result, usually `CLEAN` (see `paths.py`). `a` is alpha^2, which is
alpha_bar on a diffusion path. `denoise(x, level)` maps x_t to x0; `noise()` returns standard normal noise in the shape
of x. `after(i, t, x, x0)` is called after each step and may return what to go on from in place of x.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from . import editing
from .paths import CLEAN, DiffusionPath, Level, Path, RectifiedFlow, consistency_levels, to_x0
from .spacing import timesteps_for

Batch: TypeAlias = Any  # a torch tensor or a NumPy array; the two have no common type
Predict: TypeAlias = Callable[[Batch, float, Batch], Batch]
"""`predict(x, t, condition)` returns the raw network output for one timestep."""
PredictBoth: TypeAlias = Callable[[Batch, float, Batch, Batch], tuple[Batch, Batch]]
"""`both(x, t, condition, null_condition)` returns the raw network outputs for the two conditions."""
Denoise: TypeAlias = Callable[[Batch, Level], Batch]
Noise: TypeAlias = Callable[[], Batch]
Callback: TypeAlias = Callable[[int, float, Batch, Batch], object]
"""`callback(i, t, x, x0)` receives step, timestep, x after the step, and x0; what it returns is ignored."""
After: TypeAlias = Callable[[int, float, Batch, Batch], Batch]
"""The same, except that what it returns replaces x; None keeps x."""
Interval: TypeAlias = "Sequence[float] | None"

VARIANCE_TYPES = ("fixed_small", "fixed_large")
GUIDANCES = ("classifier_free", "auto")
"""Kinds of guidance, see `denoiser`."""


@dataclass(frozen=True)
class Sampling:
    """How images are drawn: sampler, number of steps, and guidance.

    Raises:
        ValueError: for an unknown sampler or kind of guidance, an `eta` that the sampler does not support, or an empty
            interval.
    """

    sampler: str = "dpm_solver_pp_2m"
    """A key of `SAMPLERS`."""
    steps: int = 20
    """Network evaluations per image, twice as many with guidance or with `heun`; a diffusion model has at most as many
    steps as timesteps."""
    eta: float = 0.0
    """Stochasticity of DDIM, 0 (deterministic) to 1 (the variance of DDPM); 0 for the other samplers."""
    guidance_scale: float = 1.0
    """w of the guidance; 1 disables it."""
    guidance_interval: Interval = None
    """(low, high): apply guidance only at noise levels low < sigma <= high; None applies it at all levels."""
    guidance: str = "classifier_free"
    """One of `GUIDANCES`."""

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {self.sampler!r}; known: {', '.join(SAMPLERS)}")
        if not 0 <= self.eta <= (1 if self.sampler == "ddim" else 0):
            raise ValueError(
                f"eta {self.eta:g} is not valid for sampler {self.sampler!r}; it is 0 to 1 for 'ddim' and 0 for the "
                "others"
            )
        if self.guidance not in GUIDANCES:
            raise ValueError(f"unknown guidance {self.guidance!r}; known: {', '.join(GUIDANCES)}")
        interval = self.guidance_interval
        if interval is not None and (len(interval) != 2 or interval[0] >= interval[1]):
            raise ValueError(f"guidance interval {list(interval)} is not two noise levels, the lower one first")

    @property
    def adds_noise(self) -> bool:
        """Whether the sampler draws noise after the first."""
        return self.sampler in ("ddpm", "euler_ancestral", "consistency") or self.eta > 0


@dataclass(frozen=True)
class SchedulerConfig:
    """What a trained model prescribes for sampling; the names are those of a diffusers `scheduler_config.json`."""

    path: Path
    """The path that the network was trained on."""
    prediction_type: str
    """What the network outputs: one of `paths.PREDICTION_TYPES`."""
    clip_sample: bool = True
    """Clip x0 to [-1, 1]: true for diffusion models of pixels. Latents are unbounded, and flows are not clipped."""
    variance_type: str = "fixed_small"
    """Variance of `ddpm`: one of `VARIANCE_TYPES`."""
    timestep_spacing: str = "trailing"
    """"trailing" or "leading", see `timesteps_for`."""
    steps_offset: int = 0
    """The last timestep of leading spacing."""

    def levels(self, sampler: str, steps: int) -> list[Level]:
        """Return the noise levels at which `sampler` evaluates the network, from pure noise down.

        Raises:
            ValueError: for an impossible number of steps.
        """
        if sampler == "consistency":
            return consistency_levels(self.path, steps)
        if isinstance(self.path, RectifiedFlow):
            return self.path.sampled(steps)
        total, spacing = self.path.timesteps, self.timestep_spacing
        return [self.path.level(t) for t in timesteps_for(sampler, total, steps, spacing, self.steps_offset)]


class SeededNoise:
    """Standard normal noise in which image i depends on `seeds[i]` alone, whatever the batch size.

    Calling it returns float32 [N, *shape]. NumPy's Philox generator gives the same bits on every platform.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]) -> None:
        self.generators = [np.random.Generator(np.random.Philox(seed)) for seed in seeds]
        self.shape = tuple(shape)

    def __call__(self) -> np.ndarray:
        return np.stack([rng.standard_normal(self.shape, dtype=np.float32) for rng in self.generators])


def denoiser(
    predict: Predict,
    scheduler: SchedulerConfig,
    sampling: Sampling | None = None,
    condition: Batch = None,
    null_condition: Batch = None,
    guide: Predict | None = None,
    both: PredictBoth | None = None,
) -> Denoise:
    """Wrap a network as `denoise(x, level) -> x0`, with guidance and clipping.

    With a guidance scale w other than 1 the output is r + w (c - r), where c is the network's output with `condition`.
    The reference r depends on the kind of guidance, and w = 1 disables both kinds:

    - "classifier_free": the network's output with `null_condition` (Ho & Salimans 2022).
    - "auto": the output of `guide`, a weaker version of the network, with the same `condition`, which may be None
      (Karras et al. 2024b, eq. 3).

    With a guidance interval (low, high) this applies only where low < sigma / alpha <= high (Kynkäänniemi et al. 2024);
    other steps need one network evaluation. x0 is clipped before the samplers derive the noise from it, so that both
    stay consistent. Without `sampling` there is no guidance. `both` takes the place of the two calls of
    classifier-free guidance.

    Raises:
        ValueError: for classifier-free guidance without a condition, or autoguidance without a guide.
    """
    scale, interval = (sampling.guidance_scale, sampling.guidance_interval) if sampling else (1.0, None)
    reference, reference_condition = predict, null_condition
    if sampling and sampling.guidance == "auto" and scale != 1.0:
        if guide is None:
            raise ValueError("this model has no guide for guidance 'auto'; train it with train.guide_step")
        reference, reference_condition = guide, condition
    elif scale != 1.0 and condition is None:
        raise ValueError("classifier-free guidance needs a conditional model; use guidance scale 1")

    def denoise(x: Batch, level: Level) -> Batch:
        guided = scale != 1.0 and (interval is None or interval[0] < level.relative_noise <= interval[1])
        if guided and both is not None and reference is predict:
            output, weaker = both(x, level.t, condition, null_condition)
        else:
            output = predict(x, level.t, condition)
            weaker = reference(x, level.t, reference_condition) if guided else output
        if guided:
            output = weaker + scale * (output - weaker)
        x0 = to_x0(scheduler.prediction_type, output, x, level)
        return x0.clip(-1, 1) if scheduler.clip_sample else x0

    return denoise


def _steps(levels: Sequence[Level]) -> Iterator[tuple[int, Level, Level]]:
    """Yield (i, level, next level) of each step."""
    for i, (level, following) in enumerate(itertools.pairwise(levels)):
        yield i, level, following


def _stepped(after: After | None, i: int, level: Level, x: Batch, x0: Batch) -> Batch:
    """Return x, or what `after` replaces it with."""
    replaced = after(i, level.t, x, x0) if after else None
    return x if replaced is None else replaced


def ddpm(
    denoise: Denoise,
    x: Batch,
    noise: Noise,
    levels: Sequence[Level],
    after: After | None = None,
    variance_type: str = "fixed_small",
) -> Batch:
    """Ancestral sampling (Ho et al. 2020, algorithm 2, eq. 6-7), also over a subset of the timesteps.

    `variance_type` selects one of the two variances of section 3.2: `fixed_small` is that of the posterior
    q(x_s | x_t, x_0), `fixed_large` is beta. The last step adds no noise. With `fixed_small` this sampler, `ddim`
    with eta 1 and `euler_ancestral` are the same process in three notations.
    """
    for i, level, following in _steps(levels):
        a, a_next = level.alpha**2, following.alpha**2
        x0 = denoise(x, level)
        alpha = a / a_next
        beta = 1 - alpha
        x = math.sqrt(a_next) * beta / (1 - a) * x0 + math.sqrt(alpha) * (1 - a_next) / (1 - a) * x
        if a_next < 1:
            x = x + math.sqrt(beta if variance_type == "fixed_large" else (1 - a_next) / (1 - a) * beta) * noise()
        x = _stepped(after, i, level, x, x0)
    return x


def ddim(
    denoise: Denoise,
    x: Batch,
    noise: Noise,
    levels: Sequence[Level],
    after: After | None = None,
    eta: float = 0.0,
) -> Batch:
    """DDIM (Song et al. 2021, eq. 12 and 16); `eta` 0 is deterministic, 1 has the variance of `ddpm`."""
    for i, level, following in _steps(levels):
        a, a_next = level.alpha**2, following.alpha**2
        x0 = denoise(x, level)
        eps = (x - level.alpha * x0) / level.sigma
        sigma = eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
        x = following.alpha * x0 + math.sqrt(max(1 - a_next - sigma**2, 0.0)) * eps
        if sigma > 0:
            x = x + sigma * noise()
        x = _stepped(after, i, level, x, x0)
    return x


def euler_ancestral(
    denoise: Denoise, x: Batch, noise: Noise, levels: Sequence[Level], after: After | None = None
) -> Batch:
    """Euler steps in sigma = sqrt((1 - a) / a), each followed by fresh noise (k-diffusion's sampler of this name).

    A step goes down to sigma_down = sigma_next^2 / sigma and adds noise of variance sigma_up^2 = sigma_next^2 -
    sigma_down^2. Written with r = (sigma_next / sigma)^2, which is 0 where alpha_bar is 0 and sigma infinite.
    """
    for i, level, following in _steps(levels):
        a, a_next = level.alpha**2, following.alpha**2
        x0 = denoise(x, level)
        sigma_next = following.relative_noise
        r = sigma_next**2 * a / (1 - a)
        # x / sqrt(a): the image in units in which the signal has scale 1 and the noise scale sigma
        scaled = (1 - r) * x0 + sigma_next**2 * math.sqrt(a) / (1 - a) * x
        if a_next < 1:
            scaled = scaled + sigma_next * math.sqrt(1 - r) * noise()
        x = following.alpha * scaled
        x = _stepped(after, i, level, x, x0)
    return x


def dpm_solver_pp_2m(
    denoise: Denoise, x: Batch, noise: Noise, levels: Sequence[Level], after: After | None = None
) -> Batch:
    """DPM-Solver++(2M), a second-order multistep solver (Lu et al. 2022b, algorithm 2); it draws no noise.

    The last step, to a clean image, returns x0. From pure noise the first h is infinite; that step and the next one
    are of first order.
    """
    del noise
    previous, h_previous = None, 0.0
    for i, level, following in _steps(levels):
        x0 = denoise(x, level)
        if following.sigma > 0:
            h = 0.5 * (following.log_snr - level.log_snr)
            slope = x0 if previous is None else x0 + h / (2 * h_previous) * (x0 - previous)
            x = following.sigma / level.sigma * x - following.alpha * math.expm1(-h) * slope
            previous, h_previous = x0, h
        else:
            x = x0
        x = _stepped(after, i, level, x, x0)
    return x


def euler(denoise: Denoise, x: Batch, noise: Noise, levels: Sequence[Level], after: After | None = None) -> Batch:
    """Euler steps of a rectified flow, dx = (eps - x_0) dsigma (Liu et al. 2023, algorithm 1); it draws no noise."""
    del noise
    for i, level, following in _steps(levels):
        x0 = denoise(x, level)
        x = x + (following.sigma - level.sigma) * _velocity(x, x0, level)
        x = _stepped(after, i, level, x, x0)
    return x


def heun(denoise: Denoise, x: Batch, noise: Noise, levels: Sequence[Level], after: After | None = None) -> Batch:
    """Heun's second-order steps of a rectified flow (Karras et al. 2022, algorithm 1, for dx = (eps - x_0) dsigma).

    Each step but the last evaluates the network twice. It draws no noise.
    """
    del noise
    for i, level, following in _steps(levels):
        x0 = denoise(x, level)
        step, slope = following.sigma - level.sigma, _velocity(x, x0, level)
        if following.sigma > 0:
            ahead = x + step * slope
            slope = (slope + _velocity(ahead, denoise(ahead, following), following)) / 2
        x = x + step * slope
        x = _stepped(after, i, level, x, x0)
    return x


def consistency(denoise: Denoise, x: Batch, noise: Noise, levels: Sequence[Level], after: After | None = None) -> Batch:
    """Predict a clean image and add noise of the next level, step by step (Song et al. 2023, algorithm 1)."""
    for i, level, following in _steps(levels):
        x0 = denoise(x, level)
        x = following.alpha * x0 + following.sigma * noise() if following.sigma > 0 else x0
        x = _stepped(after, i, level, x, x0)
    return x


def _velocity(x: Batch, x0: Batch, level: Level) -> Batch:
    """Return eps - x0 on the straight path, where x = (1 - sigma) x0 + sigma eps."""
    return (x - x0) / level.sigma


SAMPLERS: dict[str, Callable[..., Batch]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler_ancestral": euler_ancestral,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
    "euler": euler,
    "heun": heun,
    "consistency": consistency,
}
OF_DIFFUSION = ("ddpm", "ddim", "euler_ancestral", "dpm_solver_pp_2m", "consistency")
OF_FLOW = ("euler", "heun", "dpm_solver_pp_2m", "consistency")
"""Samplers of each kind of path. A step of `euler` is a step of `ddim` with eta 0, in other units."""
DEFAULT_SAMPLING = Sampling()


def samplers_of(path: Path) -> tuple[str, ...]:
    """Return the names of the samplers that a path has."""
    return OF_DIFFUSION if isinstance(path, DiffusionPath) else OF_FLOW


def sample(
    denoise: Denoise,
    noise: Noise,
    scheduler: SchedulerConfig,
    sampling: Sampling = DEFAULT_SAMPLING,
    callback: Callback | None = None,
    start: editing.Start | None = None,
) -> Batch:
    """Draw images, float [N, C, H, W], from pure noise: the first call of `noise` is x_T, later calls feed the sampler.

    With `start` they are drawn from a given image, see `editing.py`. Guidance is part of `denoise`, see `denoiser`.

    Raises:
        ValueError: for a sampler that the model's path does not have, or a number of steps that it does not support.
    """
    known = samplers_of(scheduler.path)
    if sampling.sampler not in known:
        kind = "diffusion model" if isinstance(scheduler.path, DiffusionPath) else "rectified flow"
        raise ValueError(f"a {kind} has no sampler {sampling.sampler!r}; use one of: {', '.join(known)}")
    own: dict[str, dict[str, float | str]] = {"ddim": {"eta": sampling.eta}}
    own["ddpm"] = {"variance_type": scheduler.variance_type}
    levels = [*scheduler.levels(sampling.sampler, sampling.steps), CLEAN]
    run = functools.partial(SAMPLERS[sampling.sampler], denoise, **own.get(sampling.sampler, {}))
    if start is not None:
        return editing.sample_from(start, run, noise, levels, callback)
    return run(noise(), noise, levels, editing.watching(callback))
