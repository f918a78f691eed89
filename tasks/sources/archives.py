"""Zip and tar files whose content nobody vouches for: listed and streamed, never unpacked to the disk.

A tar inside of them (a webdataset shard) is like a folder of its name; one inside of that is a file.
"""

from __future__ import annotations

import itertools
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from tasks.runtime.stage import StageError
from tasks.sources.entry import CHUNK, Problem, require_space

# The earliest date that a zip can hold: packing the same files twice gives the same bytes.
NO_DATE = (1980, 1, 1, 0, 0, 0)
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)
ENCRYPTED = 0x1
LOCAL_HEADER = struct.Struct("<4s22xHH")
"""What stands before a member of a zip: magic, then among others the lengths of its name and extra field."""
SHARD = ".tar"


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

    Hidden files are left out. A symbolic link is packed as a link, which nobody follows.
    Raises `StageError` where there is no file.
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
            if stat.S_ISLNK(status.st_mode):
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
                archive.writestr(info, os.fsencode(path.readlink()))
                continue
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            info.file_size = status.st_size
            with path.open("rb") as source, archive.open(info, "w") as packed:
                while chunk := source.read(CHUNK):
                    packed.write(chunk)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names (relative, '/' between parts) and paths of the files below a folder, links included."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked = [name for name in folders if Path(parent, name).is_symlink()]
        for file in files + linked:
            path = Path(parent, file)
            if not file.startswith(".") and (path.is_symlink() or path.is_file()):
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
        unsafe = path.startswith("/") or ".." in parts or ":" in parts[0] or "\0" in path
        name = path if unsafe else "/".join(parts)
        if unsafe:
            problem = Problem("unsafe path", "the path leads out of the archive")
        elif name in seen:
            problem = problem or Problem("repeated path", "the archive holds another file of this path")
        seen.add(name)
        members.append(Member(position, name, size, problem))
    return members


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
        with tarfile.open(file, "r|*") as archive:
            yield from _tar_read(archive, members, max_bytes)
    except DAMAGED as error:
        raise _damaged(file, error) from None


def _refusal(member: Member, max_bytes: int) -> Problem | None:
    if member.problem is None and member.size > max_bytes:
        return Problem("oversized", f"{member.size} bytes are over the limit of {max_bytes}")
    return member.problem


Listed = tuple[tuple[int, ...], str, int, Problem | None]


def _zip_list(file: Path) -> Iterator[Listed]:
    try:
        with zipfile.ZipFile(file) as archive:
            for position, info in enumerate(archive.infolist()):
                name, problem = info.filename.replace("\\", "/"), None
                if stat.S_ISLNK(info.external_attr >> 16):
                    problem = Problem("link", "a symbolic link")
                elif info.flag_bits & ENCRYPTED:
                    problem = Problem("encrypted", "the archive needs a password")
                listed = ((position,), name, info.file_size, problem)
                if problem is None and _is_shard(name):
                    yield from _shard_list(listed, partial(archive.open, info))
                elif not info.is_dir():
                    yield listed
    except DAMAGED as error:
        raise _damaged(file, error) from None


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
        with tarfile.open(file, "r|*") as archive:
            for listed, info in _tar_infos(archive):
                if listed[3] is None and _is_shard(listed[1]):
                    yield from _shard_list(listed, partial(archive.extractfile, info))
                else:
                    yield listed
    except DAMAGED as error:
        raise _damaged(file, error) from None


def _tar_infos(archive: tarfile.TarFile) -> Iterator[tuple[Listed, tarfile.TarInfo]]:
    for position, info in enumerate(archive):
        if info.isdir():
            continue
        problem = None
        if info.issym() or info.islnk():
            problem = Problem("link", f"a link to {info.linkname}")
        elif not info.isreg():
            problem = Problem("special file", "a device or a pipe")
        yield ((position,), text(info.name), info.size, problem), info


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
        for member in inside:
            refusal = _refusal(member, max_bytes)
            content = None if refusal else archive.extractfile(info)
            yield member, refusal or (content.read() if content else Problem("special file", "no content"))


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
    inside = {member.position[1:]: member for member in members}
    within = [replace(member, position=position) for position, member in inside.items()]
    with stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for member, content in _tar_read(archive, within, max_bytes):
            yield inside[member.position], content


def _damaged(file: Path, error: Exception) -> StageError:
    return StageError(f"{file.name} is damaged or cut off ({error}); get it again")
