"""`Member`, a file of an archive as it is listed, and the errors and limits that zip and tar files have in common."""

from __future__ import annotations

import lzma
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from tasks.runtime.errors import StageError
from tasks.sources.entry import Problem

DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)
"""Errors of the parsers for damaged or truncated archives."""
MAX_RATIO, FREE_BYTES, MAX_BYTES = 100, 16 << 20, 1 << 40
"""Limits against decompression bombs: a compressed archive that unpacks to more than `FREE_BYTES` may unpack to at most
`MAX_RATIO` times its size and at most `MAX_BYTES`. Images hardly compress, so real datasets stay far below."""
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


def refusal(member: Member, max_bytes: int) -> Problem | None:
    """Why a member is not unpacked: its problem, or a size over `max_bytes`; None if it is unpacked."""
    if member.problem is None and member.size > max_bytes:
        return Problem("oversized", f"{member.size} bytes are over the limit of {max_bytes}")
    return member.problem


def require_no_bomb(file: Path, unpacked: int) -> None:
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


def damaged(file: Path, error: Exception) -> StageError:
    """The error for an archive that a parser cannot read."""
    return StageError(f"{file.name} is damaged or truncated ({error}); get it again")
