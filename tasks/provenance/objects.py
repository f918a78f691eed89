"""DVC's content hashes, computed without DVC: of files, of folders, and of the objects in a cache.

An object of a cache is named by the MD5 of its content. That of a folder ends in `.dir` and is a JSON list of the files
below it, each with its path and MD5.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import TypeAlias

Listing: TypeAlias = dict[str, str]
"""Relative path -> MD5 of the files of a folder."""
FOLDER = ".dir"
IGNORED = ("__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".import_linter_cache")
"""Folders of `.dvcignore` that may lie inside a dependency."""


class MissingObjectError(LookupError):
    """An object is neither in the cache nor at its path."""


class DamagedObjectError(ValueError):
    """The content of an object does not have the hash that names it."""


def file_md5(file: Path) -> str:
    """Return the MD5 of a file as 32 hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def listing(folder: Path) -> Listing:
    """Return the files below a folder as DVC sees them."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    kept = {
        name: path
        for name, path in files.items()
        if not set(IGNORED) & set(PurePosixPath(name).parts) and not name.endswith(".tmp")
    }
    return {name: file_md5(path) for name, path in kept.items()}


def folder_md5(files: Listing) -> str:
    """Return the name of the object of a folder with these files."""
    entries = [{"md5": md5, "relpath": name} for name, md5 in sorted(files.items())]
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + FOLDER


def path_md5(path: Path) -> str:
    """Return the hash that DVC gives to a file or a folder."""
    return folder_md5(listing(path)) if path.is_dir() else file_md5(path)


def in_cache(cache: Path, md5: str) -> Path:
    """Return the path of an object below the folder of a cache; it need not exist."""
    return cache / "files" / "md5" / md5[:2] / md5[2:]


def read_listing(cache: Path, md5: str) -> Listing:
    """Read the object of a folder.

    Raises:
        MissingObjectError: if the cache lacks it.
        DamagedObjectError: if its content has another hash.
    """
    content = _object(cache, md5).read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() + FOLDER != md5:
        raise DamagedObjectError(f"{in_cache(cache, md5)} is damaged: its content has another hash")
    return {str(entry["relpath"]): str(entry["md5"]) for entry in json.loads(content)}


def _object(cache: Path, md5: str) -> Path:
    path = in_cache(cache, md5)
    if not path.is_file():
        raise MissingObjectError(f"{path} is missing")
    return path


def require(cache: Path, md5: str) -> int:
    """Compute the hash of an object of the cache, and of every file of a folder; returns the number of files.

    Raises:
        MissingObjectError: if the cache lacks one.
        DamagedObjectError: if the content of one has another hash.
    """
    files = list(read_listing(cache, md5).values()) if md5.endswith(FOLDER) else [md5]
    for one in sorted(set(files)):
        if file_md5(_object(cache, one)) != one:
            raise DamagedObjectError(f"{in_cache(cache, one)} is damaged: its content has another hash")
    return len(files)
