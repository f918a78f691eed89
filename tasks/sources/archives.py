"""Read untrusted zip and tar files: members are listed and streamed, never extracted to disk.

A tar inside an archive (a webdataset shard) is treated as a folder; a tar inside that one is an ordinary file.
"""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import lzma
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO, TypeAlias

from tasks.runtime.disk import printable_name
from tasks.runtime.errors import StageError
from tasks.sources.entry import Problem

DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)
ENCRYPTED, UTF8_NAME = 0x1, 0x800
"""Flag bits of a zip member."""
LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Local header of a zip member: magic, then among other fields the lengths of the name and of the extra field."""
SHARD = ".tar"
DRIVE = re.compile(r"[A-Za-z]:/")
MAX_RATIO, FREE_BYTES, MAX_BYTES = 100, 16 << 20, 1 << 40
"""Limits against decompression bombs: a compressed archive that unpacks to more than `FREE_BYTES` may unpack to at most
`MAX_RATIO` times its size and at most `MAX_BYTES`. Images hardly compress, so real datasets stay far below."""
OPENERS: dict[bytes, Callable[[Path], io.BufferedIOBase]] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
}
"""First bytes of a compressed tar -> class that opens it."""
UNREAD = Problem("unreadable file", "its permissions do not allow reading; run 'chmod +r' on it")
SPECIAL = Problem("special file", "a pipe, a socket or a device")


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an archive."""

    position: tuple[int, ...]
    """Index in the archive, or index of the shard and index within it; names may occur twice."""
    name: str
    """Path inside the archive, with '/' between its parts."""
    size: int
    """Unpacked size in bytes, as stated by the archive."""
    problem: Problem | None
    """Why the member must not be read, or None."""


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
    for position, path, size, problem in _zip_list(file) if kind(file) == "zip" else _tar_list(file):
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
        members.append(Member(position, name, size, problem))
    return members


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


def read_members(file: Path, members: list[Member], max_bytes: int) -> Iterator[tuple[Member, bytes | Problem]]:
    """Yield the content or the problem of each member: sorted by name for a zip, in archive order for a tar.

    Members larger than `max_bytes` are not unpacked.
    """
    if kind(file) == "zip":
        yield from _zip_read(file, sorted(members, key=lambda member: (member.name, member.position)), max_bytes)
        return
    try:
        with _tar(file) as archive:
            yield from _tar_read(archive, members, max_bytes)
    except DAMAGED as error:
        raise _damaged(file, error) from None


def read_heads(file: Path, members: list[Member], size: int) -> Iterator[tuple[Member, bytes]]:
    """Yield at most the first `size` bytes of each member; members that cannot be read are skipped."""
    readable = [member for member in members if member.problem is None]
    if not readable:
        return
    try:
        if kind(file) == "zip":
            yield from _zip_heads(file, readable, size)
            return
        with _tar(file) as archive:
            yield from _tar_heads(archive, readable, size)
    except DAMAGED as error:
        raise _damaged(file, error) from None


def _zip_heads(file: Path, members: list[Member], size: int) -> Iterator[tuple[Member, bytes]]:
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        for position, group in itertools.groupby(members, lambda member: member.position[0]):
            inside = list(group)
            if len(inside[0].position) > 1:
                yield from _shard_heads(archive.open(infos[position]), inside, size)
                continue
            for member in inside:
                with suppress(*DAMAGED, NotImplementedError, RuntimeError), archive.open(infos[position]) as stream:
                    yield member, stream.read(size)


def _tar_heads(archive: tarfile.TarFile, members: list[Member], size: int) -> Iterator[tuple[Member, bytes]]:
    wanted: dict[int, list[Member]] = {}
    for member in members:
        wanted.setdefault(member.position[0], []).append(member)
    for position, info in enumerate(archive):
        inside = wanted.get(position, [])
        if not inside:
            continue
        stream = archive.extractfile(info)
        if len(inside[0].position) > 1:
            yield from _shard_heads(stream, inside, size)
        elif stream:
            head = stream.read(size)
            yield from ((member, head) for member in inside)


def _shard_heads(stream: IO[bytes] | None, members: list[Member], size: int) -> Iterator[tuple[Member, bytes]]:
    within = [replace(member, position=member.position[1:]) for member in members]
    with _opened_shard(stream) as archive:
        for member, head in _tar_heads(archive, within, size):
            yield replace(member, position=(members[0].position[0], *member.position)), head


def _refusal(member: Member, max_bytes: int) -> Problem | None:
    if member.problem is None and member.size > max_bytes:
        return Problem("oversized", f"{member.size} bytes are over the limit of {max_bytes}")
    return member.problem


Listed: TypeAlias = tuple[tuple[int, ...], str, int, Problem | None]
"""Position, path, unpacked size and problem of a file in an archive."""


def _zip_list(file: Path) -> Iterator[Listed]:
    try:
        with zipfile.ZipFile(file) as archive:
            _require_no_bomb(file, sum(info.file_size for info in archive.infolist()))
            for position, info in enumerate(archive.infolist()):
                name, problem = _zip_name(info), _zip_problem(info)
                listed = ((position,), name, info.file_size, problem)
                if problem is None and _is_shard(name):
                    yield from _shard_list(listed, partial(archive.open, info))
                elif not info.is_dir():
                    yield listed
    except DAMAGED as error:
        raise _damaged(file, error) from None


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The path of a member. Names that are valid UTF-8 are read as such even without the UTF-8 flag, as macOS does."""
    name = info.filename
    if not info.flag_bits & UTF8_NAME and not name.isascii():
        with suppress(ValueError):  # in another encoding, which a zip does not declare
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")


def _zip_problem(info: zipfile.ZipInfo) -> Problem | None:
    """Why a member must not be read, according to its metadata."""
    mode = info.external_attr >> 16 if info.create_system == 3 else 0
    if stat.S_ISLNK(mode):
        return Problem("link", "a symbolic link")
    if stat.S_IFMT(mode) and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return SPECIAL
    if stat.S_ISREG(mode) and not stat.S_IMODE(mode) and not info.file_size:
        return UNREAD  # as written by `packing.pack_files`
    return Problem("encrypted", "the archive needs a password") if info.flag_bits & ENCRYPTED else None


def _zip_read(file: Path, members: list[Member], max_bytes: int) -> Iterator[tuple[Member, bytes | Problem]]:
    with zipfile.ZipFile(file) as archive, file.open("rb") as raw:
        infos = archive.infolist()
        for position, group in itertools.groupby(members, lambda member: member.position[0]):
            inside = list(group)
            if len(inside[0].position) > 1:
                yield from _shard_read(archive.open(infos[position]), inside, max_bytes)
                continue
            for member in inside:
                refusal = _refusal(member, max_bytes)
                if refusal:
                    yield member, refusal
                    continue
                try:
                    content: bytes | Problem = _zip_content(archive, raw, infos[position])
                except (*DAMAGED, NotImplementedError, RuntimeError) as error:
                    content = Problem("damaged in the archive", f"{type(error).__name__}: {error}")
                yield member, content


def _zip_content(archive: zipfile.ZipFile, raw: BinaryIO, info: zipfile.ZipInfo) -> bytes:
    """Same as `archive.read(info)`, in a third of the time for stored and deflated members.

    `raw` is the file of the archive. The difference matters for datasets of small images.
    """
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return archive.read(info)
    raw.seek(info.header_offset)
    header = raw.read(LOCAL_HEADER.size)
    if len(header) < LOCAL_HEADER.size:
        raise zipfile.BadZipFile("the archive ends within a header")
    magic, name_length, extra_length = LOCAL_HEADER.unpack(header)
    if magic != b"PK\x03\x04":
        raise zipfile.BadZipFile("there is no header at the offset in the directory")
    raw.seek(name_length + extra_length, os.SEEK_CUR)
    content = raw.read(info.compress_size)
    if info.compress_type == zipfile.ZIP_DEFLATED:
        content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, info.file_size + 1)
    if len(content) != info.file_size or zlib.crc32(content) != info.CRC:
        raise zipfile.BadZipFile("the checksum differs from the one in the directory")
    return content


def _tar_list(file: Path) -> Iterator[Listed]:
    try:
        with _tar(file) as archive:
            for listed, info in _tar_infos(archive):
                if listed[3] is None and _is_shard(listed[1]):
                    yield from _shard_list(listed, partial(archive.extractfile, info))
                else:
                    yield listed
    except DAMAGED as error:
        raise _damaged(file, error) from None


class _Counted(io.RawIOBase):
    """The unpacked stream of a compressed file; reading raises `StageError` beyond the limits of `_require_no_bomb`."""

    def __init__(self, file: Path, stream: io.BufferedIOBase) -> None:
        self._file, self._stream, self._unpacked = file, stream, 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._unpacked += len(data)
        _require_no_bomb(self._file, self._unpacked)
        return data

    def close(self) -> None:
        self._stream.close()


@contextmanager
def _tar(file: Path) -> Iterator[tarfile.TarFile]:
    """Open a tar, compressed or not, for one sequential read."""
    with file.open("rb") as raw:
        head = raw.read(8)
    opener = next((opener for magic, opener in OPENERS.items() if head.startswith(magic)), None)
    stream = _Counted(file, opener(file)) if opener else file.open("rb")
    with stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        yield archive


def _require_no_bomb(file: Path, unpacked: int) -> None:
    """Raise `StageError` if an archive unpacks to more than the limits against decompression bombs allow."""
    packed = file.stat().st_size
    if unpacked <= FREE_BYTES or unpacked <= packed:
        return
    if unpacked > MAX_RATIO * packed or unpacked > MAX_BYTES:
        raise StageError(
            f"{file.name} has {packed / 1e6:.1f} MB and unpacks to at least {unpacked / 1e6:.0f} MB, over {MAX_RATIO} "
            f"times its size or over {MAX_BYTES / 1e9:.0f} GB, like a decompression bomb; if you trust it, unpack it "
            "and set download.path to the folder"
        )


def _tar_infos(archive: tarfile.TarFile) -> Iterator[tuple[Listed, tarfile.TarInfo]]:
    """List the files of a tar. A hard link has the position and size of the file that it links to."""
    files: dict[str, Listed] = {}
    for position, info in enumerate(archive):
        if info.isdir():
            continue
        name, problem, size = printable_name(info.name), None, info.size
        place: tuple[int, ...] = (position,)
        if info.issym():
            problem = Problem("link", f"a symbolic link to {printable_name(info.linkname)}")
        elif info.islnk():
            linked = files.get(_plain(printable_name(info.linkname)))
            if linked is None or _is_shard(name):
                problem = Problem(
                    "link", f"a hard link to {printable_name(info.linkname)}, which does not precede it in the archive"
                )
            else:
                place, _, size, problem = linked
        elif not info.isreg():
            problem = SPECIAL
        listed = (place, name, size, problem)
        if info.isreg() or info.islnk():
            files[_plain(name)] = listed
        yield listed, info


def _plain(path: str) -> str:
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def _tar_read(
    archive: tarfile.TarFile, members: list[Member], max_bytes: int
) -> Iterator[tuple[Member, bytes | Problem]]:
    wanted: dict[int, list[Member]] = {}
    for member in members:
        wanted.setdefault(member.position[0], []).append(member)
    for position, info in enumerate(archive):
        inside = wanted.get(position, [])
        if inside and len(inside[0].position) > 1:
            yield from _shard_read(archive.extractfile(info), inside, max_bytes)
            continue
        content: bytes | None = None
        for member in inside:  # several if some are hard links
            refusal = _refusal(member, max_bytes)
            if refusal is None and content is None:
                stream = archive.extractfile(info)
                content = stream.read() if stream else None
            yield member, refusal or (SPECIAL if content is None else content)


def _is_shard(name: str) -> bool:
    return name.lower().endswith(SHARD)


@contextmanager
def _opened_shard(stream: IO[bytes] | None) -> Iterator[tarfile.TarFile]:
    if stream is None:
        raise tarfile.TarError("a shard is not a regular file")
    with stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        yield archive


def _shard_list(shard: Listed, opened: Callable[[], IO[bytes] | None]) -> list[Listed]:
    """Files of a tar inside an archive; for a damaged one, the tar itself with the problem."""
    position, name, size, _ = shard
    try:
        with _opened_shard(opened()) as archive:
            return [
                ((*position, *place), f"{name}/{path}", bytes_, problem)
                for (place, path, bytes_, problem), _ in _tar_infos(archive)
            ]
    except (*DAMAGED, NotImplementedError, RuntimeError) as error:
        return [(position, name, size, Problem("damaged in the archive", f"{type(error).__name__}: {error}"))]


def _shard_read(
    stream: IO[bytes] | None, members: list[Member], max_bytes: int
) -> Iterator[tuple[Member, bytes | Problem]]:
    within = [replace(member, position=member.position[1:]) for member in members]
    with _opened_shard(stream) as archive:
        for member, content in _tar_read(archive, within, max_bytes):
            yield replace(member, position=(members[0].position[0], *member.position)), content


def _damaged(file: Path, error: Exception) -> StageError:
    return StageError(f"{file.name} is damaged or truncated ({error}); get it again")
