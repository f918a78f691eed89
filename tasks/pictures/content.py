"""The content hash of a data set: SHA-256 over the identities of its images, sorted by key.

Identities are collected in the order in which images arrive. Beyond `RUN_ROWS` of them they are sorted in runs, which
are kept in an unnamed file and merged at the end, so that the memory does not grow with the data set.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

RUN_ROWS = 1 << 16
"""Pairs in memory at a time, about 17 MB."""
BUFFER_BYTES = 1 << 14
"""Read at a time from each run."""
LENGTH_BYTES = 4


@dataclass
class SortedPairs:
    """Keys with a value each, which are added in any order and read sorted; a key is added once."""

    folder: Path
    """Where the runs are kept, in one file without a name."""
    _pending: dict[bytes, bytes] = field(default_factory=dict)
    _file: IO[bytes] | None = None
    _runs: list[tuple[int, int]] = field(default_factory=list)  # where each begins and ends in the file

    def add(self, key: str, value: bytes) -> None:
        """Add a key."""
        self._pending[key.encode("utf-8")] = value
        if len(self._pending) >= RUN_ROWS:
            self._spill()

    def _spill(self) -> None:
        self._file = self._file or tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - closed by `read`
        begin = self._file.tell()
        for pair in sorted(self._pending.items()):
            for part in pair:
                self._file.write(len(part).to_bytes(LENGTH_BYTES, "little") + part)
        self._runs.append((begin, self._file.tell()))
        self._pending.clear()

    def read(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield the pairs in the order of the keys in UTF-8; nothing can be added afterwards."""
        pending = sorted(self._pending.items())
        if self._file is None:
            yield from pending
            return
        self._file.flush()
        with self._file as file:
            runs = [_run(file.fileno(), begin, end) for begin, end in self._runs]
            yield from heapq.merge(*runs, pending)


def _run(file: int, begin: int, end: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the pairs of a run; all runs share the file, so each reads by offsets."""
    buffer, place = b"", begin

    def taken(count: int) -> bytes:
        nonlocal buffer, place
        while len(buffer) < count:
            read = os.pread(file, min(max(BUFFER_BYTES, count), end - place), place)
            buffer, place = buffer + read, place + len(read)
        found, buffer = buffer[:count], buffer[count:]
        return found

    while buffer or place < end:
        yield taken(int.from_bytes(taken(LENGTH_BYTES), "little")), taken(int.from_bytes(taken(LENGTH_BYTES), "little"))


class ContentHash:
    """Collects the identity of each image; `hexdigest` is the hash of all."""

    def __init__(self, folder: Path) -> None:
        """`folder` is where identities are kept, in a file without a name."""
        self._pairs = SortedPairs(folder)

    def add(self, key: str, identity: Sequence[object]) -> None:
        """Add the image `key`, which is added once."""
        self._pairs.add(key, hashlib.sha256(json.dumps(list(identity)).encode("utf-8")).digest())

    def hexdigest(self) -> str:
        """Return the SHA-256 of the identities, sorted by key; nothing can be added afterwards."""
        content = hashlib.sha256()
        for _, digest in self._pairs.read():
            content.update(digest)
        return content.hexdigest()
