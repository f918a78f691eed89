"""The timesteps of a diffusion path at which samplers evaluate the network (Lin et al. 2024, table 2)."""

from __future__ import annotations

import numpy as np


def trailing_timesteps(total: int, steps: int) -> list[int]:
    """Return `steps` decreasing, evenly spaced timesteps of 0..total-1; the first is always total - 1.

    "Trailing" in Lin et al. 2024, table 2: sampling starts at the timestep at which training ended.

    Raises:
        ValueError: if `steps` is not in 1..total.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"sampling steps {steps} must lie between 1 and the model's {total} timesteps")
    # The arithmetic of diffusers, so that halves are rounded to the same side.
    return [int(t) - 1 for t in np.round(np.arange(total, 0, -total / steps))[:steps]]


def leading_timesteps(total: int, steps: int, offset: int = 0, intervals: int | None = None) -> list[int]:
    """Return `steps` decreasing multiples of total // steps, each plus `offset`; the last one is `offset`.

    "Leading" in Lin et al. 2024, table 2: the spacing of many published models, which starts below total - 1. If
    `intervals` exceeds `steps`, the multiples are those of total // intervals without the lowest ones.

    Raises:
        ValueError: if the first one would not be a timestep, or for an impossible number of steps.
    """
    intervals = intervals or steps
    if not 1 <= steps <= intervals <= total:
        raise ValueError(f"sampling steps {steps} must lie between 1 and {total - intervals + steps} for this model")
    chosen = [offset + i * (total // intervals) for i in range(intervals)]
    if chosen[-1] >= total:
        raise ValueError(f"{steps} sampling steps of this model begin at timestep {chosen[-1]} of {total}; take fewer")
    return chosen[intervals - steps :][::-1]


def timesteps_for(sampler: str, total: int, steps: int, spacing: str = "trailing", offset: int = 0) -> list[int]:
    """Return the timesteps at which `sampler` evaluates the network, with "trailing" or "leading" spacing.

    With leading spacing `dpm_solver_pp_2m` has one interval more than steps and stops before the last one, as in
    diffusers.

    Raises:
        ValueError: for another spacing or an impossible number of steps.
    """
    if spacing == "trailing":
        return trailing_timesteps(total, steps)
    if spacing != "leading":
        raise ValueError(f"unknown spacing {spacing!r}; known: trailing, leading")
    return leading_timesteps(total, steps, offset, steps + (sampler == "dpm_solver_pp_2m"))
