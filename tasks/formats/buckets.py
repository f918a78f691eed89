"""Aspect-ratio buckets: the resolutions at which images that are not square are stored and trained on.

The first bucket is the square of `image.resolution`. The others have about the same area and sides that the autoencoder
and the network can halve (Podell et al. 2023, SDXL, section 2.3). Each image goes to the bucket with the nearest aspect
ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

Resolution: TypeAlias = "tuple[int, int]"
"""Height and width, in pixels of the image or in cells of its latent."""


def bucket_resolutions(size: int, ratios: Sequence[float], multiple: int) -> list[Resolution]:
    """Return the resolution of each bucket, without duplicates, the square of side `size` first.

    Args:
        size: height and width of the square, in pixels.
        ratios: width / height of the other buckets.
        multiple: the sides of the other buckets are multiples of this.
    """
    found = [(size, size)]
    for ratio in ratios:
        stretch = math.sqrt(max(ratio, 1 / ratio))
        shorter = multiple * max(1, round(size / stretch / multiple))
        longer = multiple * max(1, round(size * size / shorter / multiple))
        found.append((shorter, longer) if ratio > 1 else (longer, shorter))
    return list(dict.fromkeys(found))


def nearest_bucket(height: int, width: int, resolutions: Sequence[Resolution]) -> int:
    """Return the index of the bucket whose log aspect ratio is nearest to that of an image; the first of equals."""
    ratio = math.log(width / height)
    return min(range(len(resolutions)), key=lambda n: abs(ratio - math.log(resolutions[n][1] / resolutions[n][0])))
