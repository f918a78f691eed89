"""What the characters of a text say about it: its script, and whether it is text at all."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

SLICE = 1 << 16
"""Texts looked at together; bounds the memory."""
NEUTRAL, EXPECTED, FOREIGN, CONTROL, UNKNOWN = range(5)


def is_control(character: str) -> bool:
    """Whether a character is no text: control codes but tab and line ends, surrogates, unassigned code points."""
    return character not in "\t\n\r" and unicodedata.category(character) in ("Cc", "Cs", "Cn")


class Reader:
    """Reads texts and tells, of each, whether most letters are of other scripts, and whether it holds control codes.

    Scripts are named as Unicode's names of letters begin: "LATIN", "CYRILLIC", "CJK".
    """

    def __init__(self, scripts: tuple[str, ...]) -> None:
        self.scripts = scripts
        self._kinds = np.full(0x110000, UNKNOWN, np.uint8)

    def read(self, texts: pa.Array) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """String array [N] without nulls -> (foreign, control), bool [N] each."""
        parts = [self._read(texts.slice(start, SLICE)) for start in range(0, len(texts), SLICE)]
        none = np.empty(0, bool)
        return np.concatenate([none, *(part[0] for part in parts)]), np.concatenate(
            [none, *(part[1] for part in parts)]
        )

    def _read(self, texts: pa.Array) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        import pyarrow.compute as pc

        lengths = pc.utf8_length(texts).to_numpy()
        codes = np.frombuffer("".join(texts.to_pylist()).encode("utf-32-le", "surrogatepass"), np.uint32)
        self._learn(codes)
        kinds = self._kinds[codes]
        owners = np.repeat(np.arange(len(texts)), lengths)
        counts = np.bincount(owners * UNKNOWN + kinds, minlength=len(texts) * UNKNOWN).reshape(len(texts), UNKNOWN)
        return counts[:, FOREIGN] > counts[:, EXPECTED], counts[:, CONTROL] > 0

    def _learn(self, codes: NDArray[np.uint32]) -> None:
        present = np.flatnonzero(np.bincount(codes, minlength=1))
        for code in present[self._kinds[present] == UNKNOWN].tolist():
            self._kinds[code] = self._kind(chr(code))

    def _kind(self, character: str) -> int:
        if is_control(character):
            return CONTROL
        if not unicodedata.category(character).startswith("L"):
            return NEUTRAL
        return EXPECTED if unicodedata.name(character, "").split(" ")[0] in self.scripts else FOREIGN
