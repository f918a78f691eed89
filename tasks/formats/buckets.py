"""Aspect-ratio buckets: which picture goes to which shape, so that pictures that are not square keep theirs.

A *form* is (height, width) in pixels. The square of `image.resolution` is always the first; the others have about its
area and sides that codec and network can halve (Podell et al. 2023, section 2.3). Every picture goes to the nearest
form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

Form: TypeAlias = "tuple[int, int]"


def forms(size: int, ratios: Sequence[float], multiple: int) -> list[Form]:
    """The square, then for each of `ratios` (width / height) the form of that shape and the square's area, as near as
    sides that are multiples of `multiple` come; each form once."""
    found = [(size, size)]
    for ratio in ratios:
        stretch = math.sqrt(max(ratio, 1 / ratio))
        shorter = multiple * max(1, round(size / stretch / multiple))
        longer = multiple * max(1, round(size * size / shorter / multiple))
        found.append((shorter, longer) if ratio > 1 else (longer, shorter))
    return list(dict.fromkeys(found))


def nearest(height: int, width: int, among: Sequence[Form]) -> int:
    """Which of the forms has the shape nearest to that of a picture; of two that are as near, the first."""
    shape = math.log(width / height)
    return min(range(len(among)), key=lambda number: abs(shape - math.log(among[number][1] / among[number][0])))
