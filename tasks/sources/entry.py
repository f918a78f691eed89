"""What the sources have in common: the manifest of `data/raw/`, and the entries that `ingest` takes from it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.runtime import atomic
from tasks.runtime.stage import StageError

FORMAT = 2
CHUNK = 1 << 20
SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
}
"""Names under which splits are published -> the splits known here."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why an input cannot be a row: a reason of a few words, and free text."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One input as published: a row to be, or a problem already known."""

    key: str
    data: bytes | None
    """The encoded picture; None where it was not read (`problem` says why)."""
    size: int
    """Bytes as published."""
    label: int | None = None
    captions: tuple[str, ...] = ()
    split: str | None = None
    """The published split; None where the source publishes none."""
    problem: Problem | None = None
    safety: str | None = None
    """"safe" or "unsafe" to show, as the source says (unsafe where it should say and does not); None where no picture
    of it is judged. `validate` lets only "safe" pass in a source that judges."""


@dataclass(frozen=True)
class Source:
    """A source that is ready to be read once, in an order that depends on its content alone."""

    classes: list[str]
    """Display names, in the order of the labels; empty where there are none."""
    count: int | None
    """Number of entries where it is known before they are read, for the progress bar."""
    entries: Iterator[Entry]
    unmatched_captions: int = 0
    """Captions that name no image."""


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def require_space(folder: Path, size: int) -> None:
    """Raise `StageError` unless `size` more bytes fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise StageError(
            f"{size / 1e6:.1f} MB are needed in {folder.parent}, but {free / 1e6:.1f} MB are free; free some"
        )


def settle_splits(published: set[str | None]) -> dict[str | None, str | None]:
    """What each published split becomes, None standing for "the key hash decides".

    Where only one split is published there is nothing held out, so the key hash decides, as it does
    for images outside of the split folders. Without `test`, `val` is the held-out split.
    """
    held_out = "test" if "test" in published else "val"
    if not {"train", held_out} <= published:
        return dict.fromkeys(published)
    return {"train": "train", held_out: "test", "val": "test" if held_out == "val" else "val", None: None}


def write_manifest(raw: Path, source: str, origin: str, licence: str, details: dict[str, Any] | None = None) -> None:
    """Record the files in `raw`, with size and sha256, and where they came from.

    `details` is what else the source wants to be known: counts of what it left out, names of columns.
    """
    files = [
        {"name": path.relative_to(raw).as_posix(), "size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(raw.rglob("*"))
        if path.is_file()
    ]
    atomic.write_json(
        raw / "manifest.json",
        {
            "format": FORMAT,
            "source": source,
            "origin": origin,
            "licence": licence,
            "files": files,
            "details": details or {},
        },
    )


def read_manifest(raw: Path) -> dict[str, Any]:
    """The manifest of `data/raw/`. Raises `StageError` where it, or a file of it, is missing or of another format."""
    try:
        manifest: dict[str, Any] = json.loads((raw / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{raw} holds no manifest.json; run 'dvc repro download'") from None
    if manifest.get("format") != FORMAT:
        raise StageError(f"{raw} has format {manifest.get('format')}, not {FORMAT}; run 'dvc repro -f download'")
    for file in manifest["files"]:
        if not (raw / file["name"]).is_file():
            raise StageError(f"{raw / file['name']} is missing; run 'dvc repro -f download'")
    return manifest
