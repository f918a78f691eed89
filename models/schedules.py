"""Noise schedules: beta_t for t = 0..T-1, and what follows from it. NumPy float64 throughout.

The forward process adds noise by q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)
(Ho et al. 2020, eq. 4), with alpha_bar_t = prod_{s<=t} (1 - beta_s).
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

SCHEDULES = ("linear", "cosine", "sigmoid")
BETA_START, BETA_END = 1e-4, 0.02  # Ho et al. 2020, section 4; kept for any T, as diffusers does
BETA_MAX = 0.999  # Nichol & Dhariwal 2021, section 3.2: keeps the last steps from being singular


def betas(schedule: str, timesteps: int) -> Array:
    """beta of a named schedule, float64 [T], each in (0, 1).

    `linear`: Ho et al. 2020. `cosine`: Nichol & Dhariwal 2021, eq. 17. `sigmoid`: the schedule of that
    name in diffusers (a logistic ramp over [-6, 6]). Raises `ValueError` for another name.
    """
    if schedule == "linear":
        return np.linspace(BETA_START, BETA_END, timesteps)
    if schedule == "cosine":
        edges = np.arange(timesteps + 1) / timesteps
        f = np.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - f[1:] / f[:-1], BETA_MAX)
    if schedule == "sigmoid":
        ramp = np.linspace(-6, 6, timesteps)
        return BETA_START + (BETA_END - BETA_START) / (1 + np.exp(-ramp))
    raise ValueError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")


def alpha_bar(beta: Array) -> Array:
    """Share of the signal's variance that is left, float64 [T], falling from nearly 1 towards 0."""
    return np.cumprod(1 - beta, dtype=np.float64)


def log_snr(alpha_bar: Array) -> Array:
    """log(alpha_bar / (1 - alpha_bar)), float64 [T], natural logarithm (Kingma et al. 2021, eq. 3)."""
    return np.asarray(np.log(alpha_bar) - np.log1p(-alpha_bar), dtype=np.float64)
