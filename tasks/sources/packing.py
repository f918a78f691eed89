"""Pack a folder or a list of files into a zip with reproducible bytes."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tasks.runtime.disk import CHUNK, printable_name, require_space
from tasks.runtime.errors import StageError
from tasks.runtime.progress import progress

NO_DATE = (1980, 1, 1, 0, 0, 0)
"""The earliest date of the zip format; a constant date makes the bytes reproducible."""


def pack(folder: Path, target: Path) -> None:
    """Pack a folder into an uncompressed zip whose bytes depend only on names and contents.

    Hidden files are skipped. Symbolic links (which are not followed), pipes, sockets, devices and unreadable files are
    packed without content, and `ingest` quarantines them. Raises `StageError` for a folder without files.
    """
    files = sorted(_files(folder))
    if not files:
        raise StageError(f"the folder {folder} is empty; put images into it, or point download.path elsewhere")
    pack_files(files, target)


def pack_files(files: list[tuple[str, Path]], target: Path) -> None:
    """Pack files under the names given, in this order, into an uncompressed zip; symbolic links are kept as links."""
    require_space(target.parent, sum(path.lstat().st_size for _, path in files))
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, path in progress(files, desc="pack", unit="file", delay=1):
            status = path.lstat()
            info = zipfile.ZipInfo(name, NO_DATE)
            info.create_system = 3  # Unix, also on Windows: the same bytes everywhere
            if not stat.S_ISREG(status.st_mode):
                info.external_attr = (stat.S_IFMT(status.st_mode) | 0o777) << 16
                archive.writestr(info, os.fsencode(path.readlink()) if path.is_symlink() else b"")
                continue
            try:
                source = path.open("rb")
            except PermissionError:
                info.external_attr = stat.S_IFREG << 16
                archive.writestr(info, b"")
                continue
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            info.file_size = status.st_size
            with source, archive.open(info, "w") as packed:
                while chunk := source.read(CHUNK):
                    packed.write(chunk)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names (relative, with '/' between parts) and paths of all files below a folder, links and special files too."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked = [name for name in folders if Path(parent, name).is_symlink()]
        for file in files + linked:
            path = Path(parent, file)
            if not file.startswith("."):
                yield printable_name(path.relative_to(folder).as_posix()), path
