"""Files on disk: checksums, and the space that is left for them."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from tasks.runtime.stage import StageError

CHUNK = 1 << 20
"""Bytes read at once."""


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(folder: Path, size: int) -> None:
    """Raise `StageError` unless `size` more bytes fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise StageError(
            f"{size / 1e6:.1f} MB are needed in {folder.parent}, but {free / 1e6:.1f} MB are free; free some"
        )
