"""Search for secrets in bytes: as they are, in base64 and hexadecimal, and inside of gzip and zip files."""

from __future__ import annotations

import base64
import gzip
import io
import zipfile
from collections.abc import Iterable, Iterator, Mapping


def found_in(body: bytes, secrets: Mapping[str, str]) -> list[str]:
    """Names of the secrets that `body` holds."""
    bodies = [body, *_unpacked(body)]
    return [name for name, secret in secrets.items() if _holds(bodies, list(_encodings(secret.encode())))]


def _holds(bodies: Iterable[bytes], patterns: Iterable[bytes]) -> bool:
    return any(pattern in body for body in bodies for pattern in patterns)


def _encodings(secret: bytes) -> Iterator[bytes]:
    """A secret as it is, in hexadecimal (how PostgreSQL dumps bytes), and in base64 anywhere in a longer text."""
    yield secret
    yield secret.hex().encode()
    for before in range(3):  # bytes before it modulo 3; the characters that the neighbours change are left out
        text = base64.b64encode(bytes(before) + secret)
        yield text[-(-before * 8 // 6) : (before + len(secret)) * 8 // 6]


def _unpacked(body: bytes) -> Iterator[bytes]:
    if body.startswith(b"\x1f\x8b"):
        try:
            yield gzip.decompress(body)
        except (OSError, EOFError):
            return  # cut off, or not what it begins like
    elif body.startswith(b"PK\x03\x04"):
        try:
            with zipfile.ZipFile(io.BytesIO(body)) as archive:
                for name in archive.namelist():
                    yield archive.read(name)
        except (zipfile.BadZipFile, RuntimeError):
            return
