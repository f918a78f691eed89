"""Find duplicates among images by hash: exact ones, or near ones whose perceptual hashes differ in a few bits."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

HASH_BITS = 64
CROWD = 256
"""Within a group of hashes that agree in two bands, each is compared with at most this many following ones."""

PART_HASHES = 1 << 16
"""Hashes that are compared at a time."""
SAMPLED = 64
"""Hashes of the sample from each `PART_HASHES`, which divides them."""

Rows = NDArray[np.int64]
Chosen = NDArray[np.bool_]


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
        for part in _by_bands(hashes, one | other):
            found += [(part[left], part[right]) for left, right in _agreeing(hashes[part], one | other, bits)]
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    pairs = np.unique(np.stack([np.concatenate(side) for side in zip(*found, strict=True)]), axis=1)
    return pairs[0], pairs[1]


def _by_bands(hashes: NDArray[np.uint64], mask: np.uint64) -> Iterator[Rows]:
    """Yield the places of the hashes in parts of about `PART_HASHES`; those that agree in `mask` are in one part."""
    parts = -(-len(hashes) // PART_HASHES)
    if parts == 1:
        yield np.arange(len(hashes))
        return
    sample = np.sort(hashes[:: max(1, PART_HASHES // SAMPLED)] & mask)
    bounds = [*np.unique(sample[len(sample) * np.arange(1, parts) // parts]).tolist(), None]
    start = 0
    for stop in bounds:
        blocks = range(0, len(hashes), PART_HASHES)
        inside = (_between(hashes[first : first + PART_HASHES] & mask, start, stop) + first for first in blocks)
        yield np.concatenate(list(inside))
        start = stop or 0


def _between(bands: NDArray[np.uint64], start: int, stop: int | None) -> Rows:
    """Return the places of the values from `start` up to `stop`."""
    inside = bands >= np.uint64(start)
    return np.flatnonzero(inside if stop is None else inside & (bands < np.uint64(stop)))


def _agreeing(hashes: NDArray[np.uint64], mask: np.uint64, bits: int) -> list[tuple[Rows, Rows]]:
    """Index pairs of near duplicates among hashes that agree in `mask`, in the order of its bits."""
    bands = hashes & mask
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


class Neighbours:
    """Rows with equal hashes, or with hashes that differ in a few bits; 12 bytes a row."""

    def __init__(self, hashes: NDArray[np.uint64], bits: int) -> None:
        """`hashes` uint64 [N] has one hash per row."""
        values = np.unique(hashes)
        self._pairs = near_pairs(values, bits)
        self._values, self._type = len(values), np.uint32 if len(hashes) < 2**32 - 1 else np.int64
        self._numbers = np.empty(len(hashes), self._type)
        for part in _blocks(len(hashes)):
            self._numbers[part] = np.searchsorted(values, hashes[part])

    def first(self, rows: Chosen, among: Chosen) -> tuple[Rows, Rows]:
        """Find the first row in `among` near each of `rows`, bool [N] each; a row is not near itself.

        Returns:
            The rows that have one, ascending, and that one, int64 [n] each.
        """
        absent = len(self._numbers)
        first = np.full(self._values, absent, self._type)
        for part in reversed(_blocks(absent)):  # of equal rows the one that is written last, so the first one, counts
            own = np.flatnonzero(among[part])[::-1] + part.start
            first[self._numbers[own]] = own
        nearest, (left, right) = first.copy(), self._pairs
        np.minimum.at(nearest, left, first[right])
        np.minimum.at(nearest, right, first[left])
        found: list[tuple[Rows, Rows]] = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        for part in _blocks(absent):
            own = np.flatnonzero(rows[part]) + part.start
            other = nearest[self._numbers[own]].astype(np.int64)
            has = (other != own) & (other != absent)
            found.append((own[has], other[has]))
        own, other = (np.concatenate(side) for side in zip(*found, strict=True))
        return own, other


def _blocks(count: int) -> list[slice]:
    return [slice(start, min(start + PART_HASHES, count)) for start in range(0, count, PART_HASHES)]
