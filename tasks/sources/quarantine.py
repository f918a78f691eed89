"""What could not become a row, with the reason: `data/quarantine/quarantine.parquet`.

Columns: key, reason (a few fixed words), detail, size in bytes, sha256 and the bytes themselves,
the last two null where the input was not read, the bytes also where they are large.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.sources.entry import Entry, Problem

if TYPE_CHECKING:
    import pyarrow as pa

FILE = "quarantine.parquet"
NO_IMAGE_FILE = "no image file"
"""Reason of files beside the pictures, such as a licence text: set aside, and no fault of the data."""
KEPT_BYTES = 1 << 20
BATCH_ROWS = 256


def schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("reason", pa.string(), nullable=False),
            pa.field("detail", pa.string(), nullable=False),
            pa.field("size", pa.int64(), nullable=False),
            pa.field("sha256", pa.string()),
            pa.field("bytes", pa.binary()),
        ]
    )


@dataclass
class Writer:
    """Writes the quarantine of one run into `folder`, which may be a temporary one."""

    folder: Path
    reasons: Counter[str] = field(default_factory=Counter)
    _pending: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        import pyarrow.parquet as pq

        self._file = pq.ParquetWriter(self.folder / FILE, schema(), compression="zstd")

    def add(self, entry: Entry, problem: Problem) -> None:
        self.reasons[problem.reason] += 1
        data = entry.data
        self._pending.append(
            {
                # A key may hold bytes that are no text; they are shown escaped.
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

    def _flush(self) -> None:
        import pyarrow as pa

        self._file.write_table(pa.Table.from_pylist(self._pending, schema()))
        self._pending.clear()

    def close(self) -> dict[str, int]:
        """Write what is pending; returns the number of inputs per reason."""
        self._flush()
        self._file.close()
        return dict(sorted(self.reasons.items()))
