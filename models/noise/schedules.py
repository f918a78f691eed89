"""Noise schedules: beta_t for t = 0..T-1 and the quantities derived from it, in NumPy float64.

The forward process adds noise by q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)
(Ho et al. 2020, eq. 4), with alpha_bar_t = prod_{s<=t} (1 - beta_s).
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from models.noise.paths import RECTIFIED_FLOW, DiffusionPath, Path, RectifiedFlow

Array: TypeAlias = NDArray[np.float64]

SCHEDULES = ("linear", "cosine", "sigmoid", "scaled_linear")
BETA_START, BETA_END = 1e-4, 0.02  # Ho et al. 2020, section 4; kept for any T, as diffusers does
SCALED_START, SCALED_END = 0.00085, 0.012  # Stable Diffusion's published configuration
BETA_MAX = 0.999  # Nichol & Dhariwal 2021, section 3.2: keeps the last steps from being singular


def betas(
    schedule: str,
    timesteps: int,
    zero_terminal_snr: bool = False,
    start: float | None = None,
    end: float | None = None,
) -> Array:
    """Return the betas of a named schedule, float64 [T], each in (0, 1); with `zero_terminal_snr` the last one is 1.

    `linear`: Ho et al. 2020, from `start` to `end`. `cosine`: Nichol & Dhariwal 2021, eq. 17. `sigmoid`: the schedule
    of that name in diffusers (a logistic ramp over [-6, 6], from `start` to `end`). `scaled_linear`: that of latent
    diffusion (Rombach et al. 2022), in which sqrt(beta) is linear.

    Raises:
        ValueError: for another name.
    """
    first, last = (SCALED_START, SCALED_END) if schedule == "scaled_linear" else (BETA_START, BETA_END)
    beta = _named(schedule, timesteps, first if start is None else start, last if end is None else end)
    return rescaled_to_zero_snr(beta) if zero_terminal_snr else beta


def path_of(schedule: str, timesteps: int, zero_terminal_snr: bool = False, shift: float = 1.0) -> Path:
    """Return the path of a named schedule, or the rectified flow, whose samplers `shift` their noise levels.

    Raises:
        ValueError: for another name.
    """
    noise = saved_noise(schedule, timesteps, zero_terminal_snr, shift)
    return noise if isinstance(noise, RectifiedFlow) else DiffusionPath(alpha_bar(noise))


def saved_noise(schedule: str, timesteps: int, zero_terminal_snr: bool, shift: float) -> Array | RectifiedFlow:
    """Return what `pipeline.save_pipeline` saves of a path: its betas, float64 [T], or the rectified flow itself.

    Raises:
        ValueError: for another name.
    """
    if schedule == RECTIFIED_FLOW:
        return RectifiedFlow(timesteps, shift)
    return betas(schedule, timesteps, zero_terminal_snr)


def _named(schedule: str, timesteps: int, start: float, end: float) -> Array:
    if schedule == "linear":
        return np.linspace(start, end, timesteps)
    if schedule == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, timesteps) ** 2
    if schedule == "cosine":
        edges = np.arange(timesteps + 1) / timesteps
        f = np.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - f[1:] / f[:-1], BETA_MAX)
    if schedule == "sigmoid":
        ramp = np.linspace(-6, 6, timesteps)
        return start + (end - start) / (1 + np.exp(-ramp))
    raise ValueError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")


def rescaled_to_zero_snr(beta: Array) -> Array:
    """Shift and scale sqrt(alpha_bar) so that it keeps its first value and ends at 0 (Lin et al. 2024, algorithm 1).

    x_T is then pure noise. float64 [T] -> float64 [T], T at least 2; the last beta is exactly 1.
    """
    root = np.sqrt(alpha_bar(beta))
    level = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return np.concatenate([beta[:1], 1 - level[1:] / level[:-1]])


def alpha_bar(beta: Array) -> Array:
    """Return alpha_bar_t, the remaining share of the signal's variance, float64 [T], decreasing from 1 towards 0."""
    return np.cumprod(1 - beta, dtype=np.float64)


def log_snr(alpha_bar: Array) -> Array:
    """Return the natural logarithm of the SNR, float64 [T] (Kingma et al. 2021, eq. 3); -inf where alpha_bar is 0."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(alpha_bar) - np.log1p(-alpha_bar), dtype=np.float64)
