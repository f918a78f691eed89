"""Read tar files, compressed or not, and the tars inside an archive (shards) in one sequential pass."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

from tasks.runtime.disk import printable_name
from tasks.sources.archive_members import DAMAGED, SPECIAL, Member, damaged, refusal, require_no_bomb
from tasks.sources.entry import Problem

SHARD = ".tar"
"""Suffix of a tar inside an archive."""
OPENERS: dict[bytes, Callable[[Path], io.BufferedIOBase]] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
}
"""First bytes of a compressed tar -> class that opens it."""


def list_files(file: Path) -> Iterator[Member]:
    """Yield every file of a tar, those in its shards included, with the path as it is written in the archive."""
    try:
        with _open(file) as archive:
            for member, info in _members(archive):
                if member.problem is None and is_shard(member.name):
                    yield from list_shard(member, partial(archive.extractfile, info))
                else:
                    yield member
    except DAMAGED as error:
        raise damaged(file, error) from None


def read(file: Path, members: list[Member], max_bytes: int) -> Iterator[tuple[Member, bytes | Problem]]:
    """Yield the content or the problem of each member, in archive order."""
    with _open(file) as archive:
        yield from _read(archive, members, max_bytes)


def heads(file: Path, members: list[Member], size: int) -> Iterator[tuple[Member, bytes]]:
    """Yield at most the first `size` bytes of each member, in archive order."""
    with _open(file) as archive:
        yield from _heads(archive, members, size)


def is_shard(name: str) -> bool:
    return name.lower().endswith(SHARD)


def list_shard(shard: Member, opened: Callable[[], IO[bytes] | None]) -> list[Member]:
    """Files of a tar inside an archive; for a damaged one, the tar itself with the problem."""
    try:
        with _open_shard(opened()) as archive:
            return [
                replace(member, position=(*shard.position, *member.position), name=f"{shard.name}/{member.name}")
                for member, _ in _members(archive)
            ]
    except (*DAMAGED, NotImplementedError, RuntimeError) as error:
        return [replace(shard, problem=Problem("damaged in the archive", f"{type(error).__name__}: {error}"))]


def read_shard(
    stream: IO[bytes] | None, members: list[Member], max_bytes: int
) -> Iterator[tuple[Member, bytes | Problem]]:
    """`read` for `members` of one shard, whose content is `stream`."""
    within = [replace(member, position=member.position[1:]) for member in members]
    with _open_shard(stream) as archive:
        for member, content in _read(archive, within, max_bytes):
            yield replace(member, position=(members[0].position[0], *member.position)), content


def shard_heads(stream: IO[bytes] | None, members: list[Member], size: int) -> Iterator[tuple[Member, bytes]]:
    """`heads` for `members` of one shard, whose content is `stream`."""
    within = [replace(member, position=member.position[1:]) for member in members]
    with _open_shard(stream) as archive:
        for member, head in _heads(archive, within, size):
            yield replace(member, position=(members[0].position[0], *member.position)), head


@contextmanager
def _open_shard(stream: IO[bytes] | None) -> Iterator[tarfile.TarFile]:
    if stream is None:
        raise tarfile.TarError("a shard is not a regular file")
    with stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        yield archive


@contextmanager
def _open(file: Path) -> Iterator[tarfile.TarFile]:
    """Open a tar, compressed or not, for one sequential read."""
    with file.open("rb") as raw:
        head = raw.read(8)
    opener = next((opener for magic, opener in OPENERS.items() if head.startswith(magic)), None)
    stream = _Counted(file, opener(file)) if opener else file.open("rb")
    with stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        yield archive


class _Counted(io.RawIOBase):
    """The unpacked stream of a compressed file; reading raises `StageError` beyond the limits of `require_no_bomb`."""

    def __init__(self, file: Path, stream: io.BufferedIOBase) -> None:
        self._file, self._stream, self._unpacked = file, stream, 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._unpacked += len(data)
        require_no_bomb(self._file, self._unpacked)
        return data

    def close(self) -> None:
        self._stream.close()


def _members(archive: tarfile.TarFile) -> Iterator[tuple[Member, tarfile.TarInfo]]:
    """List the files of a tar. A hard link has the position and size of the file that it links to."""
    files: dict[str, Member] = {}
    for position, info in enumerate(archive):
        if info.isdir():
            continue
        name, problem, size = printable_name(info.name), None, info.size
        place: tuple[int, ...] = (position,)
        if info.issym():
            problem = Problem("link", f"a symbolic link to {printable_name(info.linkname)}")
        elif info.islnk():
            linked = files.get(_plain(printable_name(info.linkname)))
            if linked is None or is_shard(name):
                problem = Problem(
                    "link", f"a hard link to {printable_name(info.linkname)}, which does not precede it in the archive"
                )
            else:
                place, size, problem = linked.position, linked.size, linked.problem
        elif not info.isreg():
            problem = SPECIAL
        member = Member(place, name, size, problem)
        if info.isreg() or info.islnk():
            files[_plain(name)] = member
        yield member, info


def _plain(path: str) -> str:
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def _by_position(members: list[Member]) -> dict[int, list[Member]]:
    """Index in the tar -> members there: several in a shard, or if some are hard links to the same file."""
    found: dict[int, list[Member]] = {}
    for member in members:
        found.setdefault(member.position[0], []).append(member)
    return found


def _read(archive: tarfile.TarFile, members: list[Member], max_bytes: int) -> Iterator[tuple[Member, bytes | Problem]]:
    wanted = _by_position(members)
    for position, info in enumerate(archive):
        inside = wanted.get(position, [])
        if inside and len(inside[0].position) > 1:
            yield from read_shard(archive.extractfile(info), inside, max_bytes)
            continue
        content: bytes | None = None
        for member in inside:
            refused = refusal(member, max_bytes)
            if refused is None and content is None:
                stream = archive.extractfile(info)
                content = stream.read() if stream else None
            yield member, refused or (SPECIAL if content is None else content)


def _heads(archive: tarfile.TarFile, members: list[Member], size: int) -> Iterator[tuple[Member, bytes]]:
    wanted = _by_position(members)
    for position, info in enumerate(archive):
        inside = wanted.get(position, [])
        if not inside:
            continue
        stream = archive.extractfile(info)
        if len(inside[0].position) > 1:
            yield from shard_heads(stream, inside, size)
        elif stream:
            head = stream.read(size)
            yield from ((member, head) for member in inside)
