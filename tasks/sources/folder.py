"""The source `folder`: one's own images, in a folder, a zip or a tar.

What the names say:
- folders named train, test or val (and their usual synonyms), in any case, are published splits;
- otherwise the innermost folder is the class, where there are at least two different ones;
- a table (.csv, .tsv) with a column of file names and a column of captions captions the images;
  several lines for one image are several captions;
- files beside an image under its name caption it and name its class (see `tasks.sources.sidecars`);
- webdataset shards (.tar) are looked into; train-000000.tar is a shard of the split train.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tasks.formats import decoding
from tasks.runtime.stage import StageError
from tasks.sources import archives, captions, sidecars
from tasks.sources.archives import Member
from tasks.sources.entry import SPLITS, Entry, Problem, Source, require_space, settle_splits
from tasks.sources.quarantine import NO_IMAGE_FILE
from tasks.sources.sidecars import Sidecars


@dataclass(frozen=True, slots=True)
class Place:
    """What the path of an image says."""

    split: str | None
    folder: str | None
    """The class: what a file beside the image says, or the innermost folder, unless it is a split or a shard."""


def copy(path: Path, raw: Path) -> None:
    """Bring a local folder or archive into `raw`: a folder packed into a zip, an archive as it is.

    An archive is copied and not linked: DVC makes what it keeps read-only, and that file is not ours.
    Raises `StageError` where it is missing, empty, no archive, or larger than what is free.
    """
    if path.is_dir():
        archives.pack(path, raw / "images.zip")
    elif path.is_file():
        require_space(raw, path.stat().st_size)
        shutil.copyfile(path, raw / f"images.{archives.kind(path)}")
    else:
        raise StageError(f"download.path {path} does not exist; correct it")


def read(file: Path, max_bytes: int) -> Source:
    """An archive of images -> its entries; members over `max_bytes` are not unpacked.

    Raises `StageError` where the archive is damaged, or where a table of captions fits no image.
    """
    members = archives.list_members(file)
    images = [member.name for member in members if _suffix(member) in decoding.SUFFIXES]
    tables = [member for member in members if captions.is_table(member.name) and not member.problem]
    captioned = captions.read(archives.read_members(file, tables, captions.MAX_BYTES) if tables else (), images)
    around = sidecars.beside(members, images)
    said = sidecars.read(archives.read_members(file, around, sidecars.MAX_BYTES), images) if around else Sidecars()
    for image, texts in said.texts.items():
        captioned.texts.setdefault(image, []).extend(texts)
    inputs = [member for member in members if member.name not in captioned.tables | said.files]
    places = _places(images, said.classes)
    folders = {place.folder for place in places.values() if place.folder}
    classes = sorted(folders, key=_natural) if len(folders) > 1 else []
    contents = archives.read_members(file, inputs, max_bytes)
    entries = _entries(contents, places, {name: label for label, name in enumerate(classes)}, captioned)
    return Source(classes, len(inputs), entries, captioned.unmatched)


def _entries(
    contents: Iterator[tuple[Member, bytes | Problem]],
    places: dict[str, Place],
    labels: dict[str, int],
    captioned: captions.Captions,
) -> Iterator[Entry]:
    for member, content in contents:
        data, problem = (None, content) if isinstance(content, Problem) else (content, None)
        if member.name not in places:
            problem = problem or Problem(NO_IMAGE_FILE, f"'{_suffix(member)}' is no suffix of an image")
            yield Entry(member.name, data, member.size, problem=problem)
            continue
        place = places[member.name]
        label = labels.get(place.folder) if place.folder else None
        texts = captioned.of(member.name)
        if any(captions.is_damaged(text) for text in texts):
            problem = problem or Problem("caption not UTF-8", "a caption of this image is no UTF-8 text")
        yield Entry(member.name, data, member.size, label, texts, place.split, problem)


def _places(images: list[str], classes: dict[str, str]) -> dict[str, Place]:
    """Published splits and classes of image paths, the class by a file beside the image or by its folder."""
    found = {}
    for name in images:
        parents = name.split("/")[:-1]
        splits = [SPLITS.get(_split_word(part)) for part in parents]
        innermost = parents[-1] if parents and not (splits[-1] or _is_shard(parents[-1])) else None
        found[name] = Place(next(filter(None, splits), None), classes.get(name) or innermost)
    settled = settle_splits({place.split for place in found.values()})
    return {name: Place(settled[place.split], place.folder) for name, place in found.items()}


def _is_shard(folder: str) -> bool:
    return folder.lower().endswith(archives.SHARD)


def _split_word(folder: str) -> str:
    """What may name a split: a folder's name, or the first word of a shard's, such as train-000000.tar."""
    return re.split(r"[-_.]", folder.lower())[0] if _is_shard(folder) else folder.lower()


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorting key that puts "10" after "9"."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name) if part] + [
        (0, name)
    ]


def _suffix(member: Member) -> str:
    return posixpath.splitext(member.name)[1].lower()
