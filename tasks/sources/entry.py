"""Types that all sources share: the manifest of `data/raw/`, and the entries that `ingest` reads from it."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from models.hashing import file_sha256
from models.json_files import Description, JsonObject
from tasks.runtime import atomic, integrity
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from tasks.pictures.index import CaptionFile

MANIFEST = "manifest.json"
SourceKind: TypeAlias = Literal["digits", "cifar10", "folder", "hub", "laion"]
NO_IMAGE_FILE = "no image file"
"""Reason of files that are not images, such as a licence text. `validate` does not count them as faults."""
CAPTIONS_NOT_READ = "captions not read"
"""Reason of files that seem to hold captions, but in an unsupported format or place."""
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
"""Published name of a split -> its name here."""
WHITE_SPACE = "\t\n\v\f\r\x85"
"""Control codes with the Unicode property White_Space."""


def is_control(character: str) -> bool:
    """Whether a character is not text: a control code other than white space, a surrogate or a noncharacter.

    Code points that are unassigned in the Unicode version of Python are text: newer versions may have assigned them.
    """
    category = unicodedata.category(character)
    if category == "Cn":
        return ord(character) & 0xFFFE == 0xFFFE or 0xFDD0 <= ord(character) <= 0xFDEF
    return category in ("Cc", "Cs") and character not in WHITE_SPACE


@dataclass(frozen=True, slots=True)
class Problem:
    """Why an input goes to quarantine."""

    reason: str
    """One of a few short phrases."""
    detail: str
    """Free text."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One input as published, with the problem if one is already known."""

    key: str
    data: bytes | None
    """The encoded image; None if it was not read, for the reason in `problem`."""
    size: int
    """Published size in bytes."""
    label: int | None = None
    captions: tuple[str, ...] = ()
    split: str | None = None
    """The published split; None if the source publishes none."""
    problem: Problem | None = None
    safety: str | None = None
    """Safety rating by the source, such as "safe" or "unsafe"; None if the source does not rate images. If a source
    rates any image, `validate` accepts only "safe"."""
    map_of: str | None = None
    """Key of the image that this one is the control map of; None for the images themselves."""


@dataclass(frozen=True)
class Source:
    """A source whose entries can be read once, in an order that depends only on its content."""

    classes: list[str]
    """Class names in the order of the labels; empty for an unlabelled source."""
    count: int | None
    """Number of entries for the progress bar; None if it is not known in advance."""
    entries: Iterator[Entry]
    unmatched_captions: int = 0
    """Lines of caption files that name no image."""
    caption_files: list[CaptionFile] = field(default_factory=list)
    """Statistics of the files that hold captions of many images."""
    notes: tuple[str, ...] = ()
    """Messages about how the source was read, one sentence each."""


@dataclass(frozen=True)
class TableColumns:
    """Which columns of Parquet tables to read; None or an empty list selects them by their usual names."""

    image: str | None = None
    label: str | None = None
    """A column, or an element of lists such as "attributes[20]"."""
    captions: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    """Class names in the order of the labels, if the tables do not declare them."""
    key: str | None = None
    safety: str | None = None


@dataclass(frozen=True)
class RawFile:
    """One file of `data/raw/`."""

    name: str
    """Path relative to `data/raw/`, with '/' between its parts."""
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest(Description):
    """`data/raw/manifest.json`: the files of `data/raw/` and their origin."""

    FORMAT = 2
    REMEDY = "run 'dvc repro -f download'"

    source: SourceKind
    origin: str
    """Address or name of the published data, without credentials."""
    licence: str
    files: list[RawFile]
    details: JsonObject
    """What only this source records: `columns` for tables, counts of filters and outcomes for downloads from URLs."""

    @classmethod
    def from_json(cls, values: JsonObject) -> Manifest:
        return cls(**{**values, "files": [RawFile(**file) for file in values["files"]]})

    @property
    def columns(self) -> TableColumns:
        """Columns of the tables of the sources `hub` and `laion`."""
        return TableColumns(**self.details["columns"])


def settle_splits(published: set[str | None]) -> dict[str | None, str | None]:
    """Map each published split to a split of the dataset; None means that the key hash decides.

    The key hash decides for images without a published split, and for all images if the source does not publish both
    a training split and a held-out one. If a source has no `test`, `val` is the held-out split.
    """
    held_out = "test" if "test" in published else "val"
    if not {"train", held_out} <= published:
        return dict.fromkeys(published)
    return {"train": "train", held_out: "test", "val": "test" if held_out == "val" else "val", None: None}


def write_manifest(raw: Path, source: SourceKind, origin: str, licence: str, details: JsonObject | None = None) -> None:
    """Record the files in `raw` with size and SHA-256, and their origin."""
    files = [
        RawFile(path.relative_to(raw).as_posix(), path.stat().st_size, file_sha256(path))
        for path in sorted(raw.rglob("*"))
        if path.is_file()
    ]
    with atomic.writing(raw / MANIFEST) as temporary:
        Manifest(source, origin, licence, files, details or {}).write(temporary)


def read_manifest(raw: Path) -> Manifest:
    """Read the manifest of `data/raw/`.

    Raises `StageError` if it is missing, damaged or of another format, or if a file that it lists is missing.
    """
    manifest = integrity.read_description(Manifest, raw / MANIFEST, "download")
    for file in manifest.files:
        if not (raw / file.name).is_file():
            raise StageError(f"{raw / file.name} is missing; {Manifest.REMEDY}")
    return manifest
