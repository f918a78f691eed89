"""Sets of many strings in 16 bytes each; in a set of Python a SHA-256 of 64 characters takes about 180."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

BYTES = 16
"""Of 10^9 strings, two have the same digest with a probability of 10^-21."""
TYPE = f"S{BYTES}"


def digests(strings: Iterable[str]) -> np.ndarray:
    """Return the BLAKE2b digest of each string, S16 [n]."""
    whole = b"".join(hashlib.blake2b(string.encode("utf-8"), digest_size=BYTES).digest() for string in strings)
    return np.frombuffer(whole, TYPE)


def filled(batches: Iterator[Iterable[str]], count: int) -> np.ndarray:
    """Return the digests of `count` strings that come in batches, S16 [count], without a second copy of them."""
    values, start = np.empty(count, TYPE), 0
    for batch in batches:
        found = digests(batch)
        values[start : start + len(found)] = found
        start += len(found)
    return values


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


class Places(Digests):
    """Rows by the string that they hold, in 20 bytes a row; a number is the first of those of equal strings."""

    def __init__(self, values: np.ndarray) -> None:
        """`values` are the digests of the strings of the rows, S16 [n]."""
        order = np.argsort(values, kind="stable")
        self._rows = order.astype(np.uint32 if len(values) < 1 << 32 else np.int64)
        del order
        self.values = values[self._rows]

    def rows(self, number: int) -> np.ndarray:
        """Return the rows that hold the string with this number, ascending."""
        return self._rows[number : np.searchsorted(self.values, self.values[number], "right")]

    def first(self, wanted: np.ndarray) -> np.ndarray:
        """Return the first row of each digest S16 [n], int64 [n]; -1 for those that no row has."""
        if not len(self):
            return np.full(len(wanted), -1)
        numbers = find(self.values, wanted)
        return np.where(numbers < 0, -1, self._rows[numbers].astype(np.int64))


def find(ordered: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the places of digests among `ordered`, which ascend, int64 [len(wanted)]; -1 for missing ones."""
    if not len(ordered):
        return np.full(len(wanted), -1)
    places = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return np.where(ordered[places] == wanted, places, -1)
