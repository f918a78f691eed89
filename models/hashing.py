"""SHA-256 of files and of folders, in one definition for all that names content by its hash."""

from __future__ import annotations

import hashlib
from pathlib import Path


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_sha256(folder: Path) -> dict[str, str]:
    """Return relative path -> SHA-256 of every file below a folder, sorted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def folder_sha256(folder: Path) -> str:
    """Return the SHA-256 over the relative paths and contents of all files below a folder.

    Python's bytecode caches (`__pycache__`) are left out.
    """
    content = hashlib.sha256()
    for name, sha256 in files_sha256(folder).items():
        if "__pycache__" not in name.split("/"):
            content.update(name.encode("utf-8") + b"\0" + bytes.fromhex(sha256))
    return content.hexdigest()
