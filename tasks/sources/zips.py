"""Read zip files: members are found through the directory at the end of the file."""

from __future__ import annotations

import itertools
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from tasks.sources import tars
from tasks.sources.archive_members import DAMAGED, SPECIAL, UNREAD, Member, damaged, refusal, require_no_bomb
from tasks.sources.entry import Problem

ENCRYPTED, UTF8_NAME = 0x1, 0x800
"""Flag bits of a zip member."""
LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Local header of a zip member: magic, then among other fields the lengths of the name and of the extra field."""


def list_files(file: Path) -> Iterator[Member]:
    """Yield every file of a zip, those in its shards included, with the path as it is written in the archive."""
    try:
        with zipfile.ZipFile(file) as archive:
            require_no_bomb(file, sum(info.file_size for info in archive.infolist()))
            for position, info in enumerate(archive.infolist()):
                member = Member((position,), _name(info), info.file_size, _problem(info))
                if member.problem is None and tars.is_shard(member.name):
                    yield from tars.list_shard(member, partial(archive.open, info))
                elif not info.is_dir():
                    yield member
    except DAMAGED as error:
        raise damaged(file, error) from None


def read(file: Path, members: list[Member], max_bytes: int) -> Iterator[tuple[Member, bytes | Problem]]:
    """Yield the content or the problem of each member, in the order of `members`."""
    with zipfile.ZipFile(file) as archive, file.open("rb") as raw:
        infos = archive.infolist()
        for position, group in itertools.groupby(members, lambda member: member.position[0]):
            inside = list(group)
            if len(inside[0].position) > 1:
                yield from tars.read_shard(archive.open(infos[position]), inside, max_bytes)
                continue
            for member in inside:
                refused = refusal(member, max_bytes)
                if refused:
                    yield member, refused
                    continue
                try:
                    content: bytes | Problem = _content(archive, raw, infos[position])
                except (*DAMAGED, NotImplementedError, RuntimeError) as error:
                    content = Problem("damaged in the archive", f"{type(error).__name__}: {error}")
                yield member, content


def heads(file: Path, members: list[Member], size: int) -> Iterator[tuple[Member, bytes]]:
    """Yield at most the first `size` bytes of each member that can be read, in the order of `members`."""
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        for position, group in itertools.groupby(members, lambda member: member.position[0]):
            inside = list(group)
            if len(inside[0].position) > 1:
                yield from tars.shard_heads(archive.open(infos[position]), inside, size)
                continue
            for member in inside:
                with suppress(*DAMAGED, NotImplementedError, RuntimeError), archive.open(infos[position]) as stream:
                    yield member, stream.read(size)


def _name(info: zipfile.ZipInfo) -> str:
    """The path of a member. Names that are valid UTF-8 are read as such even without the UTF-8 flag, as macOS does."""
    name = info.filename
    if not info.flag_bits & UTF8_NAME and not name.isascii():
        with suppress(ValueError):  # in another encoding, which a zip does not declare
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")


def _problem(info: zipfile.ZipInfo) -> Problem | None:
    """Why a member must not be read, according to its metadata."""
    mode = info.external_attr >> 16 if info.create_system == 3 else 0
    if stat.S_ISLNK(mode):
        return Problem("link", "a symbolic link")
    if stat.S_IFMT(mode) and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return SPECIAL
    if stat.S_ISREG(mode) and not stat.S_IMODE(mode) and not info.file_size:
        return UNREAD  # as written by `packing.pack_files`
    return Problem("encrypted", "the archive needs a password") if info.flag_bits & ENCRYPTED else None


def _content(archive: zipfile.ZipFile, raw: BinaryIO, info: zipfile.ZipInfo) -> bytes:
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
