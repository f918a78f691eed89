"""Zip and tar files whose content nobody vouches for: listed and streamed, never unpacked to the disk.

A tar inside of them (a webdataset shard) is like a folder of its name; one inside of that is a file.
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
from typing import Any, BinaryIO

from tqdm import tqdm

from tasks.runtime.disk import CHUNK, require_space
from tasks.runtime.stage import StageError
from tasks.sources.entry import Problem

# The earliest date that a zip can hold: packing the same files twice gives the same bytes.
NO_DATE = (1980, 1, 1, 0, 0, 0)
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)
ENCRYPTED, UTF8_NAME = 0x1, 0x800
"""Flags of a member of a zip."""
LOCAL_HEADER = struct.Struct("<4s22xHH")
"""What stands before a member of a zip: magic, then among others the lengths of its name and extra field."""
SHARD = ".tar"
DRIVE = re.compile(r"[A-Za-z]:/")
MAX_RATIO, FREE_BYTES, MAX_BYTES = 100, 16 << 20, 1 << 40
"""An archive may unpack to `FREE_BYTES`; to more only as long as that is not over `MAX_RATIO` times its own size, and,
where it is compressed at all, not over `MAX_BYTES`. Pictures hardly compress: only made-up data reaches such ratios."""
OPENERS: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
"""First bytes of a compressed tar -> what opens it."""
UNREAD = Problem("unreadable file", "its permissions forbid to read it; run 'chmod +r' on it")
SPECIAL = Problem("special file", "a pipe, a socket or a device")


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an archive."""

    position: tuple[int, ...]
    """Its place in the archive, or that of its shard and its place in there; names may occur twice."""
    name: str
    """Path inside the archive, with '/' between its parts."""
    size: int
    """Bytes when unpacked, as the archive says."""
    problem: Problem | None
    """Why it must not be read."""


def kind(file: Path) -> str:
    """ "zip" or "tar" (compressed or not), by content. Raises `StageError` for anything else."""
    if zipfile.is_zipfile(file):
        return "zip"
    try:
        if tarfile.is_tarfile(file):
            return "tar"
    except DAMAGED:
        pass  # what breaks the parser is no tar either
    raise StageError(f"{file.name} is neither a zip nor a tar file, or it is cut off; give a folder, a zip or a tar")


def pack(folder: Path, target: Path) -> None:
    """Pack a folder into an uncompressed zip whose bytes depend on names and contents alone.

    Hidden files are left out. Symbolic links, which nobody follows, pipes, sockets, devices and files that must not
    be read are packed by name alone, for `ingest` to set aside. Raises `StageError` where there is no file.
    """
    files = sorted(_files(folder))
    if not files:
        raise StageError(f"the folder {folder} is empty; put images into it, or point download.path elsewhere")
    pack_files(files, target)


def pack_files(files: list[tuple[str, Path]], target: Path) -> None:
    """Pack files under those names, in that order, into an uncompressed zip; a symbolic link stays one."""
    require_space(target.parent, sum(path.lstat().st_size for _, path in files))
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, path in tqdm(files, "pack", unit="file", mininterval=1, dynamic_ncols=True, delay=1):
            status = path.lstat()
            info = zipfile.ZipInfo(name, NO_DATE)
            # A zip made on Windows would say so, and differ.
            info.create_system = 3
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
    """Names (relative, '/' between parts) and paths of the files below a folder, links and special files included."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked = [name for name in folders if Path(parent, name).is_symlink()]
        for file in files + linked:
            path = Path(parent, file)
            if not file.startswith("."):
                yield text(path.relative_to(folder).as_posix()), path


def text(name: str) -> str:
    """A file's name as text that can be written anywhere: bytes that are no UTF-8 are spelled out, as in "%udcff"."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8").replace("\\", "%").replace("\0", "%00")


def list_members(file: Path) -> list[Member]:
    """Every file of an archive, in the archive's order; folders and hidden files are left out.

    Raises `StageError` where the archive cannot be read to its end.
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
    """Why a path does not name a place inside the archive; None where it does."""
    if path.startswith("/"):
        return "the path is absolute"
    if DRIVE.match(path):
        return "the path names a drive"
    if ".." in parts:
        return "the path leads out of its folder with '..'"
    return "the path holds a zero byte" if "\0" in path else None


def _is_hidden(part: str) -> bool:
    return (part.startswith(".") and part != "..") or part == "__MACOSX"


def read_members(file: Path, members: list[Member], max_bytes: int) -> Iterator[tuple[Member, bytes | Problem]]:
    """Contents of those members, or why there is none; sorted by name from a zip, in its own order from a tar.

    No member larger than `max_bytes` is unpacked.
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
    """The first bytes of those members, `size` at most; nothing for members that cannot be read."""
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


def _shard_heads(stream: Any, members: list[Member], size: int) -> Iterator[tuple[Member, bytes]]:
    within = [replace(member, position=member.position[1:]) for member in members]
    with stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for member, head in _tar_heads(archive, within, size):
            yield replace(member, position=(members[0].position[0], *member.position)), head


def _refusal(member: Member, max_bytes: int) -> Problem | None:
    if member.problem is None and member.size > max_bytes:
        return Problem("oversized", f"{member.size} bytes are over the limit of {max_bytes}")
    return member.problem


Listed = tuple[tuple[int, ...], str, int, Problem | None]


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
    """The path of a member: in UTF-8 where its bytes are, also where the archive does not say so, as on macOS."""
    name = info.filename
    if not info.flag_bits & UTF8_NAME and not name.isascii():
        with suppress(ValueError):  # an older encoding, of which the archive does not say which
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")


def _zip_problem(info: zipfile.ZipInfo) -> Problem | None:
    """Why a member must not be read, by what the archive says about it."""
    mode = info.external_attr >> 16 if info.create_system == 3 else 0
    if stat.S_ISLNK(mode):
        return Problem("link", "a symbolic link")
    if stat.S_IFMT(mode) and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return SPECIAL
    if stat.S_ISREG(mode) and not stat.S_IMODE(mode) and not info.file_size:
        return UNREAD  # as `pack_files` writes it
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
    """What `archive.read(info)` gives; of a stored or deflated member from `raw`, the same file, in a third of the
    time, which counts where pictures are small."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return archive.read(info)
    raw.seek(info.header_offset)
    header = raw.read(LOCAL_HEADER.size)
    if len(header) < LOCAL_HEADER.size:
        raise zipfile.BadZipFile("the archive ends within a header")
    magic, name_length, extra_length = LOCAL_HEADER.unpack(header)
    if magic != b"PK\x03\x04":
        raise zipfile.BadZipFile("no header where the archive's list says")
    raw.seek(name_length + extra_length, os.SEEK_CUR)
    content = raw.read(info.compress_size)
    if info.compress_type == zipfile.ZIP_DEFLATED:
        content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, info.file_size + 1)
    if len(content) != info.file_size or zlib.crc32(content) != info.CRC:
        raise zipfile.BadZipFile("the checksum is not that of the archive's list")
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
    """A compressed file as it is unpacked; refuses to unpack more than `_require_no_bomb` allows."""

    def __init__(self, file: Path, stream: Any) -> None:
        self._file, self._stream, self._unpacked = file, stream, 0

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._stream.read(size)
        self._unpacked += len(data)
        _require_no_bomb(self._file, self._unpacked)
        return data

    def close(self) -> None:
        self._stream.close()


@contextmanager
def _tar(file: Path) -> Iterator[tarfile.TarFile]:
    """A tar, compressed or not, opened to be read once from its start to its end."""
    with file.open("rb") as raw:
        head = raw.read(8)
    opener = next((opener for magic, opener in OPENERS.items() if head.startswith(magic)), None)
    stream = _Counted(file, opener(file)) if opener else file.open("rb")
    with stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        yield archive


def _require_no_bomb(file: Path, unpacked: int) -> None:
    """Raise `StageError` where an archive unpacks to so much more than its own size that it was made to do harm."""
    packed = file.stat().st_size
    if unpacked <= FREE_BYTES or unpacked <= packed:
        return
    if unpacked > MAX_RATIO * packed or unpacked > MAX_BYTES:
        raise StageError(
            f"{file.name} has {packed / 1e6:.1f} MB and unpacks to {unpacked / 1e6:.0f} MB or more, over {MAX_RATIO} "
            f"times its size or over {MAX_BYTES / 1e9:.0f} GB, as archives do that are made to fill a disk; if it is "
            "what you want, unpack it yourself and let download.path name the folder"
        )


def _tar_infos(archive: tarfile.TarFile) -> Iterator[tuple[Listed, tarfile.TarInfo]]:
    """Every file of a tar. A hard link has the position and the size of the file whose content it shares."""
    files: dict[str, Listed] = {}
    for position, info in enumerate(archive):
        if info.isdir():
            continue
        name, problem, size = text(info.name), None, info.size
        place: tuple[int, ...] = (position,)
        if info.issym():
            problem = Problem("link", f"a symbolic link to {text(info.linkname)}")
        elif info.islnk():
            linked = files.get(_plain(text(info.linkname)))
            if linked is None or _is_shard(name):
                problem = Problem(
                    "link", f"a hard link to {text(info.linkname)}, which is not in the archive before it"
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
        for member in inside:  # more than one where the others are hard links to it
            refusal = _refusal(member, max_bytes)
            if refusal is None and content is None:
                stream = archive.extractfile(info)
                content = stream.read() if stream else None
            yield member, refusal or (SPECIAL if content is None else content)


def _is_shard(name: str) -> bool:
    return name.lower().endswith(SHARD)


def _shard_list(shard: Listed, opened: Callable[[], Any]) -> list[Listed]:
    """Files of a tar inside of an archive; the tar itself, with the reason, where it cannot be read to its end."""
    position, name, size, _ = shard
    try:
        with opened() as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            return [
                ((*position, *place), f"{name}/{path}", bytes_, problem)
                for (place, path, bytes_, problem), _ in _tar_infos(archive)
            ]
    except (*DAMAGED, NotImplementedError, RuntimeError) as error:
        return [(position, name, size, Problem("damaged in the archive", f"{type(error).__name__}: {error}"))]


def _shard_read(stream: Any, members: list[Member], max_bytes: int) -> Iterator[tuple[Member, bytes | Problem]]:
    within = [replace(member, position=member.position[1:]) for member in members]
    with stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for member, content in _tar_read(archive, within, max_bytes):
            yield replace(member, position=(members[0].position[0], *member.position)), content


def _damaged(file: Path, error: Exception) -> StageError:
    return StageError(f"{file.name} is damaged or cut off ({error}); get it again")
