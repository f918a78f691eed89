"""Samplers as free functions, from the papers, for torch tensors and NumPy arrays alike.

Only arithmetic operators touch the images, so the same lines run under torch here and under NumPy in
the exported bundle, into which this file is copied as it stands.

Legend: `x` is x_t, float [N, C, H, W]; `x0` the predicted clean image, about [-1, 1]; `a` = alpha_bar.
`denoise(x, t)` maps x_t and the integer timestep to x0; `noise()` draws standard normal noise shaped
like x; `timesteps` falls from about T-1 towards 0. `callback(i, t, x, x0)` sees every step after it was made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

Denoise: TypeAlias = Callable[[Any, int], Any]
Noise: TypeAlias = Callable[[], Any]
Levels: TypeAlias = "Sequence[float] | np.ndarray"
Callback: TypeAlias = Callable[[int, int, Any, Any], None]
Interval: TypeAlias = "Sequence[float] | None"


class SeededNoise:
    """Standard normal draws in which image i depends on `seeds[i]` alone, whatever the batch.

    Calling it returns float32 [N, *shape]. NumPy's Philox generator gives the same bits on every platform.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]) -> None:
        self.generators = [np.random.Generator(np.random.Philox(seed)) for seed in seeds]
        self.shape = tuple(shape)

    def __call__(self) -> Any:
        return np.stack([rng.standard_normal(self.shape, dtype=np.float32) for rng in self.generators])


def trailing_timesteps(total: int, steps: int) -> list[int]:
    """`steps` timesteps of 0..total-1, falling and evenly spaced, the first always total-1.

    Lin et al. 2024, table 2 ("trailing"): sampling must begin where training ended.
    Raises `ValueError` if `steps` is not in 1..total.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"sampling steps {steps} must lie between 1 and the model's {total} timesteps")
    # In the same arithmetic as diffusers, so that halves are rounded to the same side.
    return [int(t) - 1 for t in np.round(np.arange(total, 0, -total / steps))[:steps]]


def leading_timesteps(total: int, steps: int, offset: int = 0, intervals: int | None = None) -> list[int]:
    """`steps` timesteps of 0..total-1, falling, multiples of total // steps plus `offset`; the last is `offset`.

    Lin et al. 2024, table 2 ("leading"): as many published models were sampled, beginning below total-1. With more
    `intervals` than steps the multiples are of total // intervals, and the lowest ones are left out. Raises
    `ValueError` where the first would not be a timestep.
    """
    intervals = intervals or steps
    if not 1 <= steps <= intervals <= total:
        raise ValueError(f"sampling steps {steps} must lie between 1 and {total - intervals + steps} for this model")
    chosen = [offset + i * (total // intervals) for i in range(intervals)]
    if chosen[-1] >= total:
        raise ValueError(f"{steps} sampling steps of this model begin at timestep {chosen[-1]} of {total}; take fewer")
    return chosen[intervals - steps :][::-1]


def timesteps_for(sampler: str, total: int, steps: int, spacing: str = "trailing", offset: int = 0) -> list[int]:
    """The timesteps at which `sampler` calls the network, in the spacing "trailing" or "leading".

    Leading, `dpm_solver_pp_2m` has one interval more than steps and stops before the last, as in diffusers. Raises
    `ValueError` for another spacing or an impossible number of steps.
    """
    if spacing == "trailing":
        return trailing_timesteps(total, steps)
    if spacing != "leading":
        raise ValueError(f"unknown spacing {spacing!r}; known: trailing, leading")
    return leading_timesteps(total, steps, offset, steps + (sampler == "dpm_solver_pp_2m"))


def to_x0(prediction: str, output: Any, x: Any, a: float) -> Any:
    """Network output -> x0. `epsilon`: Ho et al. 2020, eq. 15. `sample`: x0 itself. `v_prediction`: Salimans &
    Ho 2022, section 4.

    Raises `ValueError` for another prediction, and for `epsilon` where alpha_bar is 0: x_t is then that very noise.
    """
    if prediction == "epsilon":
        if a == 0:
            raise ValueError("the noise in pure noise says nothing of an image; train with another prediction")
        return (x - math.sqrt(1 - a) * output) / math.sqrt(a)
    if prediction == "sample":
        return output
    if prediction == "v_prediction":
        return math.sqrt(a) * x - math.sqrt(1 - a) * output
    raise ValueError(f"unknown prediction {prediction!r}; known: epsilon, sample, v_prediction")


def denoiser(
    predict: Callable[[Any, int, Any], Any],
    prediction: str,
    alpha_bar: Levels,
    condition: Any = None,
    null_condition: Any = None,
    guidance_scale: float = 1.0,
    guidance_interval: Interval = None,
    clip: bool = True,
) -> Denoise:
    """Wrap a network as `denoise(x, t) -> x0`, clipped to [-1, 1] unless told not to (latents have no bounds).

    `predict(x, t, condition)` is the network's raw output. With a `guidance_scale` w other than 1 the
    output is u + w (c - u), c conditional and u with `null_condition` (Ho & Salimans 2022, in the
    parametrisation where w = 1 is no guidance); with a `guidance_interval` (low, high) only where
    low < sigma <= high, sigma = sqrt((1 - a) / a) (Kynkäänniemi et al. 2024), which also saves the
    second evaluation elsewhere. x0 is clipped before anything else is derived from it, so the noise that a
    sampler infers stays consistent with it. Raises `ValueError` for an empty interval.
    """
    if guidance_interval is not None and (len(guidance_interval) != 2 or guidance_interval[0] >= guidance_interval[1]):
        raise ValueError(f"guidance interval {list(guidance_interval)} is not two noise levels, the lower one first")

    def denoise(x: Any, t: int) -> Any:
        output, a = predict(x, t, condition), float(alpha_bar[t])
        if guidance_scale != 1.0 and _within(guidance_interval, a):
            unguided = predict(x, t, null_condition)
            output = unguided + guidance_scale * (output - unguided)
        x0 = to_x0(prediction, output, x, a)
        return x0.clip(-1, 1) if clip else x0

    return denoise


def _within(interval: Interval, a: float) -> bool:
    """Whether the noise level at alpha_bar `a` lies in (low, high]; None is everywhere."""
    if interval is None:
        return True
    sigma = math.sqrt((1 - a) / a) if a > 0 else math.inf
    return interval[0] < sigma <= interval[1]


def _pairs(alpha_bar: Levels, timesteps: Sequence[int]) -> list[tuple[int, int, float, float]]:
    """(i, t, alpha_bar at t, alpha_bar at the next timestep); after the last comes a clean image, 1."""
    levels = [float(alpha_bar[t]) for t in timesteps] + [1.0]
    return [(i, t, levels[i], levels[i + 1]) for i, t in enumerate(timesteps)]


def _log_snr(a: float) -> float:
    return math.log(a / (1 - a)) if a > 0 else -math.inf


def _report(callback: Callback | None, i: int, t: int, x: Any, x0: Any) -> None:
    if callback:
        callback(i, t, x, x0)


def ddpm(
    denoise: Denoise,
    x: Any,
    noise: Noise,
    alpha_bar: Levels,
    timesteps: Sequence[int],
    callback: Any = None,
    variance: str = "fixed_small",
) -> Any:
    """Ancestral sampling (Ho et al. 2020, algorithm 2, eq. 6-7), also over a subset of timesteps.

    `variance` is one of `VARIANCES`, the two choices of section 3.2 there: that of the posterior q(x_s | x_t, x_0),
    or the larger beta; the last step adds none. (With `fixed_small` this, `ddim` with eta 1 and `euler_ancestral`
    are one process in three notations.)
    """
    for i, t, a, a_next in _pairs(alpha_bar, timesteps):
        x0 = denoise(x, t)
        alpha = a / a_next
        beta = 1 - alpha
        x = math.sqrt(a_next) * beta / (1 - a) * x0 + math.sqrt(alpha) * (1 - a_next) / (1 - a) * x
        if a_next < 1:
            x = x + math.sqrt(beta if variance == "fixed_large" else (1 - a_next) / (1 - a) * beta) * noise()
        _report(callback, i, t, x, x0)
    return x


def ddim(
    denoise: Denoise,
    x: Any,
    noise: Noise,
    alpha_bar: Levels,
    timesteps: Sequence[int],
    callback: Any = None,
    eta: float = 0.0,
) -> Any:
    """Song et al. 2021, eq. 12 and 16; `eta` 0 is deterministic, 1 has the noise of `ddpm`."""
    for i, t, a, a_next in _pairs(alpha_bar, timesteps):
        x0 = denoise(x, t)
        eps = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
        sigma = eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
        x = math.sqrt(a_next) * x0 + math.sqrt(max(1 - a_next - sigma**2, 0.0)) * eps
        if sigma > 0:
            x = x + sigma * noise()
        _report(callback, i, t, x, x0)
    return x


def euler_ancestral(
    denoise: Denoise, x: Any, noise: Noise, alpha_bar: Levels, timesteps: Sequence[int], callback: Any = None
) -> Any:
    """Euler steps in sigma = sqrt((1 - a) / a), each followed by fresh noise (k-diffusion's sampler of that name).

    It steps down to sigma_down = sigma_next^2 / sigma and adds noise of sigma_up^2 = sigma_next^2 - sigma_down^2.
    Written with r = (sigma_next / sigma)^2, which is 0 where alpha_bar is 0 and sigma infinite.
    """
    for i, t, a, a_next in _pairs(alpha_bar, timesteps):
        x0 = denoise(x, t)
        sigma_next = math.sqrt((1 - a_next) / a_next)
        r = sigma_next**2 * a / (1 - a)
        # x / sqrt(a) is the image in units where the signal has size 1 and the noise size sigma
        scaled = (1 - r) * x0 + sigma_next**2 * math.sqrt(a) / (1 - a) * x
        if a_next < 1:
            scaled = scaled + sigma_next * math.sqrt(1 - r) * noise()
        x = math.sqrt(a_next) * scaled
        _report(callback, i, t, x, x0)
    return x


def dpm_solver_pp_2m(
    denoise: Denoise, x: Any, noise: Noise, alpha_bar: Levels, timesteps: Sequence[int], callback: Any = None
) -> Any:
    """DPM-Solver++(2M), second-order multistep (Lu et al. 2022b, algorithm 2); draws no `noise`.

    The last step, to a clean image, is the prediction itself. From pure noise (alpha_bar 0) h is infinite, and this
    step and the one after it are of first order.
    """
    del noise
    previous, h_previous = None, 0.0
    for i, t, a, a_next in _pairs(alpha_bar, timesteps):
        x0 = denoise(x, t)
        if a_next < 1:
            h = 0.5 * (_log_snr(a_next) - _log_snr(a))
            slope = x0 if previous is None else x0 + h / (2 * h_previous) * (x0 - previous)
            x = math.sqrt((1 - a_next) / (1 - a)) * x - math.sqrt(a_next) * math.expm1(-h) * slope
            previous, h_previous = x0, h
        else:
            x = x0
        _report(callback, i, t, x, x0)
    return x


SAMPLERS: dict[str, Callable[..., Any]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler_ancestral": euler_ancestral,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
}
VARIANCES = ("fixed_small", "fixed_large")


def sample(
    sampler: str,
    denoise: Denoise,
    noise: Noise,
    alpha_bar: Levels,
    steps: int,
    callback: Any = None,
    eta: float = 0.0,
    variance: str = "fixed_small",
    spacing: str = "trailing",
    steps_offset: int = 0,
) -> Any:
    """Draw clean images from pure noise: the first call of `noise` is x_T, later ones feed the sampler.

    `eta` is read by `ddim` and `variance` by `ddpm`; `spacing` and `steps_offset` are those of `timesteps_for`. Raises
    `ValueError` for an unknown sampler, an impossible number of steps, or an `eta` that the sampler does not have.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; known: {', '.join(SAMPLERS)}")
    if not 0 <= eta <= (1 if sampler == "ddim" else 0):
        raise ValueError(f"eta {eta:g} does not fit sampler {sampler!r}; it is 0 to 1 for 'ddim' and 0 for the others")
    own: dict[str, dict[str, Any]] = {"ddim": {"eta": eta}, "ddpm": {"variance": variance}}
    timesteps = timesteps_for(sampler, len(alpha_bar), steps, spacing, steps_offset)
    return SAMPLERS[sampler](denoise, noise(), noise, alpha_bar, timesteps, callback, **own.get(sampler, {}))
