"""Post-hoc EMA: averages of any width from stored averages of a few widths (Karras et al. 2024, section 3.2).

A power-law average with exponent gamma, updated after every step as `models/optimization/ema.py` does, weighs the
weights after step s by

    p(s) = (s / T)^(gamma + 1) - ((s - 1) / T)^(gamma + 1),  s = 1 .. T,

exactly: the integral over (s - 1, s] of the paper's continuous profile (equation 1). A sum of stored averages with
coefficients x is therefore the average with the profile sum_i x_i p_i(s). The coefficients are those whose profile is
closest to the wanted one in the sense of least squares, under the condition that they add up to 1. Each profile adds up
to 1, so with another sum all weights would be scaled, and a network with scaled weights draws broken images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from models.optimization.ema import WIDEST_STD, gamma_of_std

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 1 << 16
"""Steps whose profiles are in memory at a time."""


@dataclass(frozen=True)
class Stored:
    """A stored power-law average."""

    step: int
    """Number of the last step that it contains, 1 or more."""
    gamma: float


@dataclass(frozen=True)
class Combination:
    """A weighted sum of stored averages."""

    coefficients: NDArray[np.float64]
    """[N], in the order of the stored averages; they add up to 1."""
    error: float
    """Root of the summed squared differences between the profile and the wanted one, relative to the wanted one."""


def profile(stored: Stored, first: int, last: int) -> NDArray[np.float64]:
    """Return the weights p(s) of the steps s = first .. last in a stored average, [last - first + 1].

    Steps after the stored one have weight 0.
    """
    edges = np.minimum(np.arange(first - 1, last + 1) / stored.step, 1.0)
    return np.diff(edges ** (stored.gamma + 1))


def combine(stored: Sequence[Stored], std: float, steps: int) -> Combination:
    """Return the combination of N stored averages that is closest to the average of relative width `std` at `steps`.

    Raises:
        ValueError: without stored averages, or unless 0 < std < `WIDEST_STD`.
    """
    if not stored:
        raise ValueError("there are no stored averages to combine")
    if not 0 < std < WIDEST_STD:
        raise ValueError(f"the width {std:g} must lie between 0 and {WIDEST_STD:.3f}")
    wanted = Stored(steps, gamma_of_std(std))
    # Overlaps of the differences p_i - p*, whose combination with a sum of 1 is the difference of the profiles: solving
    # for these loses fewer digits than subtracting overlaps of whole profiles.
    overlaps, norm = np.zeros((len(stored), len(stored))), 0.0
    for first in range(1, steps + 1, BLOCK):
        last = min(first + BLOCK - 1, steps)
        target = profile(wanted, first, last)
        differences = np.stack([profile(each, first, last) - target for each in stored])
        overlaps += differences @ differences.T
        norm += float(target @ target)
    overlaps /= norm
    coefficients = _smallest(overlaps)
    square = float(coefficients @ overlaps @ coefficients)
    return Combination(coefficients, math.sqrt(max(0.0, square)))


def _smallest(overlaps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return x with sum 1 that minimises x^T K x for overlaps K [N, N], positive semidefinite.

    The condition is kept exactly by a basis: x = e_j + B y, where the columns of B add up to 0.
    """
    nearest = int(np.argmin(np.diag(overlaps)))
    others = [index for index in range(len(overlaps)) if index != nearest]
    basis = np.eye(len(overlaps))[:, others]
    basis[nearest] = -1.0
    solution = np.linalg.lstsq(basis.T @ overlaps @ basis, -basis.T @ overlaps[:, nearest], rcond=None)[0]
    coefficients = basis @ solution
    coefficients[nearest] += 1.0
    return np.asarray(coefficients)
