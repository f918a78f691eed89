"""SHA-256 of files and of folders, in one definition for all that names content by its hash."""

from __future__ import annotations

import hashlib
from pathlib import Path


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_sha256(folder: Path) -> str:
    """Return the SHA-256 over names and contents of the files directly in a folder."""
    content = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        content.update(file.name.encode("utf-8") + b"\0" + bytes.fromhex(file_sha256(file)))
    return content.hexdigest()
