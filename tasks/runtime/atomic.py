"""Atomic writing: a file or folder is written under a temporary name, flushed to the disk, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models import json_files


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary file name beside `path`; it is renamed to `path` on success and removed after an error."""
    temporary = _temporary_name(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; it replaces `path` on success and is removed after an error."""
    temporary = _temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            sync(file)
        sync(temporary)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`."""
    with writing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write `value` to `path` in the format of `models.json_files.write_json`."""
    with writing(path) as temporary:
        json_files.write_json(temporary, value)


def _temporary_name(path: Path) -> Path:
    """The temporary name for `path` in this process; leftovers of processes that were killed are removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        pid = int(left.name.split(".")[-2])
        if pid != os.getpid() and _is_alive(pid):
            continue
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _is_alive(pid: int) -> bool:
    """Whether a process exists that has not ended; a zombie has ended."""
    import psutil  # only needed after a kill

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
