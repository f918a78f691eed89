"""The content hash of a data set: SHA-256 over the identities of its images, sorted by key.

Identities are collected in the order in which images arrive. Beyond `RUN_ROWS` of them they are sorted in runs, which
are kept in unnamed files and merged at the end, so that the memory does not grow with the data set.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

RUN_ROWS = 1 << 18
"""Identities in memory at a time, about 70 MB."""
DIGEST_BYTES = 32
LENGTH_BYTES = 4


@dataclass
class ContentHash:
    """Collects the identity of each image; `hexdigest` is the hash of all."""

    folder: Path
    """Where the runs are kept, as files without a name."""
    _pending: dict[bytes, bytes] = field(default_factory=dict)
    _runs: list[IO[bytes]] = field(default_factory=list)

    def add(self, key: str, identity: Sequence[object]) -> None:
        """Add the image `key`, which is added once."""
        self._pending[key.encode("utf-8")] = hashlib.sha256(json.dumps(list(identity)).encode("utf-8")).digest()
        if len(self._pending) >= RUN_ROWS:
            self._spill()

    def _spill(self) -> None:
        run = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - closed by `hexdigest`
        for key, digest in sorted(self._pending.items()):
            run.write(len(key).to_bytes(LENGTH_BYTES, "little") + key + digest)
        run.seek(0)
        self._runs.append(run)
        self._pending.clear()

    def hexdigest(self) -> str:
        """Return the SHA-256 of the identities, sorted by key; nothing can be added afterwards."""
        content = hashlib.sha256()
        for _, digest in heapq.merge(*map(_read, self._runs), sorted(self._pending.items())):
            content.update(digest)
        for run in self._runs:
            run.close()
        return content.hexdigest()


def _read(run: IO[bytes]) -> Iterator[tuple[bytes, bytes]]:
    while length := run.read(LENGTH_BYTES):
        yield run.read(int.from_bytes(length, "little")), run.read(DIGEST_BYTES)
