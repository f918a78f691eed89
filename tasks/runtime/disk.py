"""Files on disk: chunk size of reading, printable names and the free space."""

from __future__ import annotations

import shutil
from pathlib import Path

from tasks.runtime.errors import StageError

CHUNK = 1 << 20
"""Bytes that are read at once."""


def printable_name(name: str) -> str:
    """Return a file name as valid UTF-8 without NUL; bytes that are not UTF-8 are escaped, as in "%udcff"."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8").replace("\\", "%").replace("\0", "%00")


def require_space(folder: Path, size: int) -> None:
    """Raise `StageError` unless `size` more bytes fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise StageError(
            f"{size / 1e6:.1f} MB are needed in {folder.parent}, but {free / 1e6:.1f} MB are free; free some"
        )
