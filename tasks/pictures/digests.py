"""Sets of many strings in 16 bytes each; in a set of Python a SHA-256 of 64 characters takes about 180."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

BYTES = 16
"""Of 10^9 strings, two have the same digest with a probability of 10^-21."""
TYPE = f"S{BYTES}"


def digests(strings: Iterable[str]) -> np.ndarray:
    """Return the BLAKE2b digest of each string, S16 [n]."""
    whole = b"".join(hashlib.blake2b(string.encode("utf-8"), digest_size=BYTES).digest() for string in strings)
    return np.frombuffer(whole, TYPE)


class Digests:
    """A set of strings, numbered in the order of their digests."""

    def __init__(self, values: np.ndarray) -> None:
        """`values` are the digests of the strings, S16 [n], which may repeat."""
        self.values = np.unique(values)

    def __len__(self) -> int:
        return len(self.values)

    def numbers(self, strings: Iterable[str]) -> np.ndarray:
        """Return the numbers of strings, int64 [n]; -1 for those that are not in the set."""
        return find(self.values, digests(strings))


def find(ordered: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the places of digests among `ordered`, which ascend, int64 [len(wanted)]; -1 for missing ones."""
    if not len(ordered):
        return np.full(len(wanted), -1)
    places = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return np.where(ordered[places] == wanted, places, -1)
