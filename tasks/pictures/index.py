"""`data/images/index.json`: counts, class names, licence and hashes of the dataset that `ingest` wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from models.json_files import Description, JsonObject
from tasks.runtime import integrity
from tasks.runtime.errors import StageError

FILE = "index.json"


@dataclass(frozen=True)
class CaptionFile:
    """Statistics of one file that holds captions of many images."""

    key: str
    """Name of the file."""
    captions: int = 0
    """Captions that belong to an image of the dataset."""
    matched: int = 0
    """Lines that name an image of the dataset."""
    unmatched: int = 0
    """Lines that name another image."""
    first_unmatched: str = ""


@dataclass(frozen=True)
class ImageIndex(Description):
    """Content of `index.json`."""

    FORMAT = 2
    REMEDY = integrity.remedy("ingest")

    shards: list[str]
    """File names of the Parquet shards, sorted."""
    files: dict[str, str]
    """SHA-256 by file name of a shard."""
    rows: int
    splits: dict[str, int]
    """Number of images by split."""
    caption_count: int
    sha256: str
    """Hash of the content: keys, image hashes, splits, labels and captions."""
    classes: list[str] = field(default_factory=list)
    """Class names in the order of the labels; empty for an unlabelled dataset."""
    licence: str = ""
    source: str = ""
    inputs: int = 0
    """Rows and quarantined inputs together."""
    quarantined: dict[str, int] = field(default_factory=dict)
    """Number of quarantined inputs by reason."""
    unmatched_captions: int = 0
    """Lines of caption files that name no image of the dataset."""
    caption_files: list[CaptionFile] = field(default_factory=list)
    profiles: dict[str, int] = field(default_factory=dict)
    """Number of images whose colour profile was converted or could not be used."""

    @classmethod
    def from_json(cls, values: JsonObject) -> ImageIndex:
        files = [CaptionFile(**value) for value in values.get("caption_files", [])]
        return cls(**{**values, "caption_files": files})


def read_index(images: Path) -> ImageIndex:
    """Read `index.json` of an images folder. Raises `StageError` if it is missing, damaged or of another format."""
    return integrity.read_description(ImageIndex, images / FILE, "ingest")


def class_index(images: Path, name: str, key: str) -> int:
    """Return the label of the class `name`, which the parameter `key` asks for.

    Raises:
        StageError: if it does not exist.
    """
    classes = read_index(images).classes
    if name not in classes:
        raise StageError(f"{key} names the class '{name}', and the data has {', '.join(classes) or 'none'}; correct it")
    return classes.index(name)
