"""Whether two means differ by more than their spread: Welch's t-test at 5 %, two-sided (Welch 1947).

The difference d exceeds the spread if |d| > t * sqrt(s_a^2 / n_a + s_b^2 / n_b), where t is the 97.5 % quantile of
Student's distribution with Welch and Satterthwaite's degrees of freedom, rounded down.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
"""97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; the last serves for all larger numbers."""
RULE = (
    "Two means differ if their difference exceeds the spread by Welch's t-test at 5 %, two-sided and not corrected for "
    "the number of comparisons."
)
FEWEST = 2
"""Least number of values with a spread."""


@dataclass(frozen=True)
class Sample:
    """Mean, sample standard deviation and number of values."""

    mean: float
    spread: float | None
    """None for a single value."""
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Sample:
        """Summarise at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) >= FEWEST else None, len(values))


def margin(a: Sample, b: Sample) -> float | None:
    """Return the largest difference of the means that the spreads explain; None without spreads."""
    if a.spread is None or b.spread is None:
        return None
    parts = a.spread**2 / a.n, b.spread**2 / b.n
    if not sum(parts):
        return 0.0
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (a.n - 1) + parts[1] ** 2 / (b.n - 1))
    # Rounding errors of the quotient must not cost a degree of freedom.
    return QUANTILES[min(int(freedom + 1e-9), len(QUANTILES)) - 1] * math.sqrt(sum(parts))


def differ(a: Sample, b: Sample) -> bool | None:
    """Return whether the means differ by more than the spreads explain; None if that cannot be decided."""
    limit = margin(a, b)
    return None if limit is None else abs(a.mean - b.mean) > limit
