"""`data/quarantine/`: inputs that did not become images of the dataset, each with the reason.

`quarantine.parquet` has the columns key, reason (one of a few short phrases), detail, size in bytes, sha256 and bytes;
sha256 and bytes are null if the input was not read, bytes also if it is larger than `KEPT_BYTES`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from models.json_files import Description
from tasks.runtime import integrity
from tasks.sources.entry import CAPTIONS_NOT_READ, Entry, Problem

FILE, INDEX = "quarantine.parquet", "index.json"
KEPT_BYTES = 1 << 20
BATCH_ROWS = 256
MAX_MESSAGE_CHARACTERS = 300
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("sha256", pa.string()),
        pa.field("bytes", pa.binary()),
    ]
)


@dataclass(frozen=True)
class QuarantineIndex(Description):
    """`data/quarantine/index.json`."""

    FORMAT = 1
    REMEDY = integrity.remedy("ingest")

    inputs: int
    """All inputs of `ingest`."""
    rows: int
    """Inputs that became images of the dataset."""
    quarantined: dict[str, int]
    """Number of quarantined inputs by reason."""


def read_index(quarantine: Path) -> QuarantineIndex:
    """Read the index. Raises `StageError` if it is missing, damaged or of another format."""
    return integrity.read_description(QuarantineIndex, quarantine / INDEX, "ingest")


@dataclass
class Writer:
    """Writes the quarantine of one run into `folder`."""

    folder: Path
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    """The first input for each reason, with the detail."""
    _pending: list[dict[str, str | int | bytes | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._file = pq.ParquetWriter(self.folder / FILE, SCHEMA, compression="zstd")

    def add(self, entry: Entry, problem: Problem) -> None:
        """Add an input with its problem."""
        self.reasons[problem.reason] += 1
        self.first.setdefault(problem.reason, printable(f"{entry.key}: {problem.detail}"))
        data = entry.data
        self._pending.append(
            {
                # A file name may hold bytes that are not UTF-8; they are written escaped.
                "key": entry.key.encode("utf-8", "backslashreplace").decode("utf-8"),
                "reason": problem.reason,
                "detail": problem.detail.encode("utf-8", "backslashreplace").decode("utf-8"),
                "size": entry.size,
                "sha256": None if data is None else hashlib.sha256(data).hexdigest(),
                "bytes": data if data is not None and len(data) <= KEPT_BYTES else None,
            }
        )
        if len(self._pending) >= BATCH_ROWS:
            self._flush()

    def summary(self) -> list[str]:
        """One sentence for each reason: the number of inputs, and the first one."""
        return [_sentence(reason, count, self.first[reason]) for reason, count in sorted(self.reasons.items())]

    def _flush(self) -> None:
        self._file.write_table(pa.Table.from_pylist(self._pending, SCHEMA))
        self._pending.clear()

    def close(self) -> dict[str, int]:
        """Write the remaining rows and return the number of inputs by reason."""
        self._flush()
        self._file.close()
        return dict(sorted(self.reasons.items()))


def _sentence(reason: str, count: int, first: str) -> str:
    if reason == CAPTIONS_NOT_READ:
        looks = "file or line looks like captions and is" if count == 1 else "files or lines look like captions and are"
        return f"{count} {looks} not read ({first})"
    return f"{count} x {reason} ({first})"


def printable(text: str) -> str:
    """Replace characters of untrusted text that are unsafe in a terminal, and limit the length."""
    return "".join(character if character.isprintable() else "?" for character in text)[:MAX_MESSAGE_CHARACTERS]
