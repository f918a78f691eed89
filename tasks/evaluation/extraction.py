"""Images by row, and what networks make of them: each image is passed through each network once.

Parts of a draw, its classes, the floor and the training images that are searched overlap. They are described as rows of
the arrays that hold them, and the output of a network is kept by array and row.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

Network: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""Images uint8 [n, C, S, S], n >= 1 -> float32 [n, D], row by row."""
Result = TypeVar("Result")

COPIED = 500
"""Images that are copied for a network at a time, at most, where their rows do not follow each other."""


class Part(NamedTuple):
    """Some images of an array."""

    array: np.ndarray
    """uint8 [N, C, S, S]; must not change afterwards."""
    rows: np.ndarray
    """int64 [n]"""


@dataclass(frozen=True, eq=False)
class Images:
    """Images of one or several arrays, in this order."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, array: np.ndarray, rows: np.ndarray | None = None) -> Images:
        """Return these rows of an array, uint8 [N, C, S, S] and int64 [n]; None is all."""
        return cls((Part(array, np.arange(len(array)) if rows is None else rows),))

    def __len__(self) -> int:
        return sum(len(part.rows) for part in self.parts)

    @property
    def pixels(self) -> np.ndarray:
        """uint8 [n, C, S, S], as a copy."""
        return np.concatenate([part.array[part.rows] for part in self.parts])


@dataclass
class _Known:
    """What is known of the rows of one array."""

    array: weakref.ref[np.ndarray]
    outputs: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """By network: float32 [N, D], and bool [N] for the rows that were computed."""
    results: dict[tuple[str, bytes], Any] = field(default_factory=dict)
    """By name and rows."""


class Extraction:
    """Outputs of networks by array and row, kept as long as the array; the arrays themselves are not kept."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def output(self, name: str, network: Network, images: Images) -> np.ndarray:
        """Return the output of `network`, called `name`, for these images: float32 [n, D], n >= 1.

        The network is applied to the rows for which it has not been. In other batches the last digits of an output may
        differ.
        """
        return np.concatenate([self._rows(name, network, part) for part in images.parts if len(part.rows)])

    def once(self, name: str, function: Callable[[Images], Result], images: Images) -> Result:
        """Return `function(images)`, computed at the first call for these rows.

        Raises:
            ValueError: for images of several arrays.
        """
        (part,) = images.parts
        results, key = self._of(part.array).results, (name, part.rows.tobytes())
        if key not in results:
            results[key] = function(images)
        result: Result = results[key]
        return result

    def _of(self, array: np.ndarray) -> _Known:
        known = self._known.get(id(array))
        if known is None or known.array() is not array:  # a new array may have the id of one that is gone
            known = self._known[id(array)] = _Known(weakref.ref(array))
        return known

    def _rows(self, name: str, network: Network, part: Part) -> np.ndarray:
        outputs = self._of(part.array).outputs
        missing = np.unique(part.rows)
        if name in outputs:
            missing = missing[~outputs[name][1][missing]]
        for some in _batches(missing):
            values = network(part.array[some])
            if name not in outputs:
                count = len(part.array)
                outputs[name] = np.empty((count, *values.shape[1:]), values.dtype), np.zeros(count, bool)
            kept, known = outputs[name]
            kept[some], known[some] = values, True
        return outputs[name][0][part.rows]


def _batches(rows: np.ndarray) -> Iterator[slice | np.ndarray]:
    """Yield ascending rows as one slice, which copies nothing, if they follow each other; else in parts."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        yield slice(int(rows[0]), int(rows[-1]) + 1)
        return
    for start in range(0, len(rows), COPIED):
        yield rows[start : start + COPIED]
