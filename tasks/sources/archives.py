"""Read untrusted zip and tar files: members are listed and streamed, never extracted to disk.

A tar inside an archive (a webdataset shard) is treated as a folder; a tar inside that one is an ordinary file.
"""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tasks.runtime.errors import StageError
from tasks.sources import tars, zips
from tasks.sources.archive_members import DAMAGED, Member, damaged
from tasks.sources.entry import Problem

DRIVE = re.compile(r"[A-Za-z]:/")


def kind(file: Path) -> str:
    """Detect the format by content: "zip" or "tar" (compressed or not). Raises `StageError` for other files."""
    if zipfile.is_zipfile(file):
        return "zip"
    try:
        if tarfile.is_tarfile(file):
            return "tar"
    except DAMAGED:
        pass  # the parser fails on some files that are not tar
    raise StageError(f"{file.name} is neither a zip nor a tar file, or is truncated; use a folder, a zip or a tar")


def list_members(file: Path) -> list[Member]:
    """List all files of an archive in their order, without folders and hidden files.

    Raises `StageError` if the archive is damaged, truncated or a decompression bomb.
    """
    seen: set[str] = set()
    members = []
    for listed in (zips if kind(file) == "zip" else tars).list_files(file):
        path, problem = listed.name, listed.problem
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if not parts or any(_is_hidden(part) for part in parts):
            continue
        unsafe = _unsafe(path, parts)
        name = path if unsafe else "/".join(parts)
        if unsafe:
            problem = Problem("unsafe path", unsafe)
        elif name in seen:
            problem = problem or Problem("repeated path", "the archive holds another file of this path")
        seen.add(name)
        members.append(replace(listed, name=name, problem=problem))
    return members


def read_members(file: Path, members: list[Member], max_bytes: int) -> Iterator[tuple[Member, bytes | Problem]]:
    """Yield the content or the problem of each member: sorted by name for a zip, in archive order for a tar.

    Members larger than `max_bytes` are not unpacked.
    """
    if kind(file) == "zip":
        yield from zips.read(file, sorted(members, key=lambda member: (member.name, member.position)), max_bytes)
        return
    try:
        yield from tars.read(file, members, max_bytes)
    except DAMAGED as error:
        raise damaged(file, error) from None


def read_heads(file: Path, members: list[Member], size: int) -> Iterator[tuple[Member, bytes]]:
    """Yield at most the first `size` bytes of each member; members that cannot be read are skipped."""
    readable = [member for member in members if member.problem is None]
    if not readable:
        return
    try:
        yield from (zips if kind(file) == "zip" else tars).heads(file, readable, size)
    except DAMAGED as error:
        raise damaged(file, error) from None


def _unsafe(path: str, parts: list[str]) -> str | None:
    """Why a path is not a safe path inside the archive; None for safe paths."""
    if path.startswith("/"):
        return "the path is absolute"
    if DRIVE.match(path):
        return "the path has a drive letter"
    if ".." in parts:
        return "the path contains '..'"
    return "the path contains a null byte" if "\0" in path else None


def _is_hidden(part: str) -> bool:
    return (part.startswith(".") and part != "..") or part == "__MACOSX"
