"""One split of the dataset: labels, captions and keys of all its rows, and the pixels of those that are used.

A split may have millions of rows, of which a stage uses some thousands. Captions and keys stay in a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

HELD_OUT = 20_000
"""Held-out images that are measured on or compared with, at most; the fingerprint of a measurement holds their number.

Whoever changes how they are chosen raises `Measurement.FORMAT`.
"""


@dataclass(frozen=True)
class Split:
    """One split without its pixels, sorted by key: what a choice of rows may depend on."""

    labels: np.ndarray
    """int64 [N]; -1 for unlabelled images"""
    captions: Sequence[list[str]]
    keys: Sequence[str]
    """Both are read from a file when they are asked for, see `tasks.pictures.spooled.Column`."""

    def with_condition(self, conditioning: str) -> np.ndarray:
        """Return the rows that have what a model of this conditioning is conditioned on, int64 [at most N]."""
        if conditioning == "label":
            return np.flatnonzero(self.labels >= 0)
        if conditioning == "text":
            return np.flatnonzero(np.fromiter(map(bool, self.captions), np.bool_, len(self.captions)))
        return np.arange(len(self.keys))


@dataclass(frozen=True)
class Samples(Split):
    """One split as pixels, sorted by key.

    Pixels that need more than `images.IN_MEMORY_BYTES` are memory-mapped from an unnamed file in the scratch folder,
    which is deleted with the array. Callers that read many rows should read them in parts.
    """

    pixels: np.ndarray
    """uint8 [N, channels, resolution, resolution]"""
    rows: np.ndarray | None = None
    """int64 [n], ascending: the rows of the split whose pixels were read, `pixels` then being [n, ...]; None is all."""

    def at(self, rows: np.ndarray) -> np.ndarray:
        """Return the pixels of rows of the split, uint8 [len(rows), channels, resolution, resolution].

        Raises:
            ValueError: if the pixels of one of them were not read.
        """
        return self.pixels[self.places(rows)]

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Return where the pixels of rows of the split are in `pixels`, int64 [len(rows)].

        Raises:
            ValueError: if the pixels of one of them were not read.
        """
        if self.rows is None:
            return rows
        places = np.searchsorted(self.rows, rows)
        if len(rows) and (places.max() >= len(self.rows) or (self.rows[places] != rows).any()):
            raise ValueError("pixels are asked for that were not read")
        return places

    @property
    def by_row(self) -> np.ndarray | ByRow:
        """The pixels by rows of the split, as a training reads them."""
        return self.pixels if self.rows is None else ByRow(self)

    def only_read(self) -> Samples:
        """Return the rows whose pixels were read as a split of their own."""
        if self.rows is None or len(self.rows) == len(self.keys):
            return Samples(self.labels, self.captions, self.keys, self.pixels)
        rows = self.rows.tolist()
        return Samples(
            self.labels[self.rows], [self.captions[r] for r in rows], [self.keys[r] for r in rows], self.pixels
        )


class ByRow:
    """`Samples.at` in the form of an array [N, channels, resolution, resolution] that is indexed by rows."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    @property
    def shape(self) -> tuple[int, ...]:
        """With the N of the split."""
        return len(self._samples.keys), *self._samples.pixels.shape[1:]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self._samples.at(rows)


def held_out_rows(split: Split) -> np.ndarray:
    """Return the held-out images that are measured on, see `stratified`; of at most `HELD_OUT` that is all."""
    return stratified(split.labels, HELD_OUT)


def stratified(labels: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Return `count` random rows in proportion to the labels, int64 [min(count, N)], ascending.

    Every label, -1 among them, has a row if there are no more labels than rows.

    Args:
        labels: int64 [N].
        count: Number of rows.
        seed: Of the choice.
    """
    if len(labels) <= count:
        return np.arange(len(labels))
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    _, first, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(first, sizes)
    return np.sort(order[np.argsort(rank / np.repeat(sizes, sizes), kind="stable")[:count]])
