"""Classify the characters of captions: expected scripts, other scripts, control characters."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.sources.entry import is_control

if TYPE_CHECKING:
    from numpy.typing import NDArray

SLICE = 1 << 16
"""Number of texts per batch; limits the memory."""
NEUTRAL, EXPECTED, FOREIGN, CONTROL, UNKNOWN = range(5)


class Reader:
    """Detects texts in unexpected scripts and texts with control characters.

    `scripts` are the expected ones, written as the first word of the Unicode names of their letters: "LATIN",
    "CYRILLIC", "CJK".
    """

    def __init__(self, scripts: tuple[str, ...]) -> None:
        self.scripts = scripts
        self._kinds = np.full(0x110000, UNKNOWN, np.uint8)

    def read(self, texts: pa.Array) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """String array [N] without nulls -> (foreign, control), bool [N] each.

        A text is foreign if more letters belong to other scripts than to the expected ones.
        """
        parts = [self._read(texts.slice(start, SLICE)) for start in range(0, len(texts), SLICE)]
        empty = np.empty(0, bool)
        foreign, control = zip((empty, empty), *parts, strict=True)
        return np.concatenate(foreign), np.concatenate(control)

    def _read(self, texts: pa.Array) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        lengths = pc.utf8_length(texts).to_numpy()
        codes = np.frombuffer("".join(texts.to_pylist()).encode("utf-32-le", "surrogatepass"), np.uint32)
        self._classify(codes)
        kinds = self._kinds[codes]
        owners = np.repeat(np.arange(len(texts)), lengths)
        counts = np.bincount(owners * UNKNOWN + kinds, minlength=len(texts) * UNKNOWN).reshape(len(texts), UNKNOWN)
        return counts[:, FOREIGN] > counts[:, EXPECTED], counts[:, CONTROL] > 0

    def _classify(self, codes: NDArray[np.uint32]) -> None:
        present = np.flatnonzero(np.bincount(codes, minlength=1))
        for code in present[self._kinds[present] == UNKNOWN].tolist():
            self._kinds[code] = self._kind(chr(code))

    def _kind(self, character: str) -> int:
        if is_control(character):
            return CONTROL
        if not unicodedata.category(character).startswith("L"):
            return NEUTRAL
        return EXPECTED if unicodedata.name(character, "").split(" ")[0] in self.scripts else FOREIGN
