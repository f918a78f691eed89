"""Find duplicates among images by hash: exact ones, or near ones whose perceptual hashes differ in a few bits."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

HASH_BITS = 64
CROWD = 256
"""Within a group of hashes that agree in two bands, each is compared with at most this many following ones."""

Rows = NDArray[np.int64]


def to_numbers(hashes: list[str]) -> NDArray[np.uint64]:
    """Hashes of 16 hexadecimal digits -> uint64 [N]."""
    return np.frombuffer(bytes.fromhex("".join(hashes)), ">u8").astype(np.uint64)


def near_pairs(hashes: NDArray[np.uint64], bits: int) -> tuple[Rows, Rows]:
    """Indices of the pairs of different `hashes` (uint64 [U], each once, sorted) that differ in at most `bits` bits.

    The hashes are cut into bits + 2 bands, so such a pair agrees in at least two bands. For each pair of bands the
    hashes are sorted by these bands, and only hashes that agree in both are compared.
    """
    found: list[tuple[Rows, Rows]] = []
    edges = np.linspace(0, HASH_BITS, bits + 3).astype(int)
    masks = [np.uint64(((1 << (b - a)) - 1) << a) for a, b in pairwise(edges)]
    for one, other in combinations(masks, 2) if bits else ():
        found += _agreeing(hashes, hashes & (one | other), bits)
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    pairs = np.unique(np.stack([np.concatenate(side) for side in zip(*found, strict=True)]), axis=1)
    return pairs[0], pairs[1]


def _agreeing(hashes: NDArray[np.uint64], bands: NDArray[np.uint64], bits: int) -> list[tuple[Rows, Rows]]:
    """Index pairs of near duplicates among hashes whose `bands` are equal, in the order of the bands."""
    order = np.argsort(bands, kind="stable")
    bands, own = bands[order], hashes[order]
    found, left = [], np.arange(len(order))
    for distance in range(1, CROWD + 1):
        left = left[left + distance < len(order)]
        left = left[bands[left] == bands[left + distance]]
        if not len(left):
            break
        near = left[np.bitwise_count(own[left] ^ own[left + distance]) <= bits]
        found.append((order[near], order[near + distance]))
    return found


def first_duplicates(hashes: NDArray[np.uint64], rows: Rows, among: Rows, bits: int) -> Rows:
    """For each of `rows` the first row in `among` whose hash differs in at most `bits` bits, -1 for none.

    `hashes` (uint64 [N]) has one hash per row; `rows` and `among` are indices into it. A row is not its own duplicate.
    """
    values, numbers = np.unique(hashes, return_inverse=True)
    absent = len(hashes)
    first = np.full(len(values), absent)
    np.minimum.at(first, numbers[among], among)
    nearest = first.copy()
    left, right = near_pairs(values, bits)
    np.minimum.at(nearest, left, first[right])
    np.minimum.at(nearest, right, first[left])
    found = nearest[numbers[rows]]
    return np.where((found == rows) | (found == absent), -1, found)
