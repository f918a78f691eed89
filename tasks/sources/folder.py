"""The source `folder`: the user's own images, in a folder, a zip or a tar.

Splits and classes:
- folders named train, test or val (or a usual synonym, in any case) are published splits. Such a folder is a class
  instead (bus, car, train) if it holds images, other image folders lie beside it, and no train and test folder do;
- otherwise the innermost folder is the class, if the dataset has at least two classes;
- members of webdataset shards (.tar) are read; train-000000.tar is a shard of the split train.

Control maps for a ControlNet: images in a folder `conditioning` are the maps of the images of the same names, which lie
beside that folder or in a folder `images` beside it.

Captions (names are compared in Unicode form NFC):
- caption files: .csv, .tsv, .jsonl, .json, see `tasks.sources.captions`; several lines for one image are several
  captions;
- text files with the name of an image, beside it or in a folder `captions`: each line is a caption; a caption with
  line breaks needs a .json file (see `tasks.sources.sidecars`, also for classes).

Files and lines that look like captions and cannot be read go to quarantine with the reason. Lines of a caption file
that name no image are counted and reported, but they are no quarantined inputs: a complete caption file beside a
subset of the images is common.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.pictures import decoding
from tasks.runtime.disk import require_space
from tasks.runtime.errors import StageError
from tasks.sources import archives, captions, packing, sidecars, suffixes, tars
from tasks.sources.entry import CAPTIONS_NOT_READ, NO_IMAGE_FILE, SPLITS, Entry, Problem, Source, settle_splits
from tasks.sources.text_files import composed, is_damaged

if TYPE_CHECKING:
    from tasks.pictures.index import CaptionFile
    from tasks.sources.archive_members import Member
    from tasks.sources.sidecars import Sidecars


CONDITIONING = "conditioning"
"""Name of a folder of control maps."""


@dataclass(frozen=True, slots=True)
class Place:
    """Split and class of an image."""

    split: str | None
    class_name: str | None
    """From the sidecar file, or the innermost folder unless that is a split or a shard."""


def copy(path: Path, raw: Path) -> None:
    """Pack a local folder into `raw/images.zip`, or copy a local archive.

    An archive is not linked, because DVC makes its files read-only. Raises `StageError` if `path` is missing, empty,
    not an archive, or larger than the free space.
    """
    if path.is_dir():
        packing.pack(path, raw / "images.zip")
    elif path.is_file():
        require_space(raw, path.stat().st_size)
        shutil.copyfile(path, raw / f"images.{archives.kind(path)}")
    else:
        raise StageError(f"download.path {path} does not exist; correct it")


def read(file: Path, max_bytes: int) -> Source:
    """Open an archive of images; members over `max_bytes` are not unpacked.

    Raises `StageError` if the archive is damaged, or if a caption table names none of the images.
    """
    members = archives.list_members(file)
    found = _pictures_by_content(file, members)
    pictures = [member.name for member in members if _suffix(member) in suffixes.SUFFIXES or member.name in found]
    owned_maps = control_maps(pictures)
    images = [name for name in pictures if name not in owned_maps]
    around = sidecars.beside(members, images)
    tables = [
        member
        for member in members
        if member not in around and not member.problem and captions.may_hold_captions(member.name)
    ]
    captioned = captions.read(archives.read_members(file, tables, captions.MAX_BYTES) if tables else (), images)
    owners = {member.name: owned for member, owned in around.items()}
    beside = sidecars.read(archives.read_members(file, list(around), sidecars.MAX_BYTES) if around else (), owners)
    for image, texts in beside.texts.items():
        captioned.texts.setdefault(image, []).extend(texts)
    captioned.unread |= beside.unread
    read_files = {table.key for table in captioned.files} | beside.files
    inputs = [member for member in members if member.name not in read_files]
    places, notes = _places(images, beside.classes)
    names = {place.class_name for place in places.values() if place.class_name}
    classes = sorted(names, key=_natural) if len(names) > 1 else []
    contents = archives.read_members(file, inputs, max_bytes)
    entries = _entries(contents, places, {name: label for label, name in enumerate(classes)}, captioned, owned_maps)
    notes += [*_file_notes(captioned.files), *_line_notes(beside)]
    count = len(inputs) + len(captioned.damaged)
    return Source(classes, count, entries, captioned.unmatched, captioned.files, tuple(notes))


def control_maps(pictures: list[str]) -> dict[str, str]:
    """Return name of a control map -> name of its image, for the pictures in folders `conditioning`.

    Empty if no name fits: such a folder is then one of images like the others.
    """
    images = {_without_folder(name, "images"): name for name in pictures if CONDITIONING not in name.split("/")[:-1]}
    maps = {name: _without_folder(name, CONDITIONING) for name in pictures if CONDITIONING in name.split("/")[:-1]}
    return {name: images[stem] for name, stem in maps.items() if stem in images}


def _without_folder(name: str, folder: str) -> str:
    """Return a path without suffix and without its folders of the name `folder`."""
    *parents, last = posixpath.splitext(name)[0].split("/")
    return "/".join([*(part for part in parents if part != folder), last])


def _pictures_by_content(file: Path, members: list[Member]) -> set[str]:
    """Names of the members with an unknown suffix whose first bytes are those of an image."""
    known = suffixes.SUFFIXES | suffixes.OTHER_SUFFIXES
    unknown = [member for member in members if member.size and _suffix(member) not in known]
    heads = archives.read_heads(file, unknown, decoding.HEAD_BYTES)
    return {member.name for member, head in heads if decoding.kind_of(head)}


def _file_notes(files: list[CaptionFile]) -> list[str]:
    """Messages about the caption files that were read."""
    notes = [f"{file.captions} captions from {file.key}" for file in files]
    unmatched = [file for file in files if file.unmatched]
    return notes + [
        f"{file.unmatched} lines of {file.key} name no image ({file.first_unmatched})" for file in unmatched
    ]


def _line_notes(beside: Sidecars) -> list[str]:
    """Message about text files with several lines."""
    if not beside.several:
        return []
    first, lines = next(iter(beside.several.items()))
    files = "caption file has" if len(beside.several) == 1 else "caption files have"
    wrapped = f", and {len(beside.wrapped)} of them may be one wrapped text ({next(iter(beside.wrapped), '')})"
    sentence = (
        f"{len(beside.several)} {files} several lines, and each line is a separate caption ({first}: {lines} "
        f"captions){wrapped if beside.wrapped else ''}; write a caption that goes over several lines as one line"
    )
    return [sentence]


def _entries(
    contents: Iterator[tuple[Member, bytes | Problem]],
    places: dict[str, Place],
    labels: dict[str, int],
    captioned: captions.Captions,
    owned_maps: dict[str, str],
) -> Iterator[Entry]:
    stems: set[str] | None = None
    for member, content in contents:
        data, problem = (None, content) if isinstance(content, Problem) else (content, None)
        if member.name in owned_maps:
            yield Entry(member.name, data, member.size, map_of=owned_maps[member.name])
            continue
        if member.name not in places:
            stems = _stems(places) if stems is None else stems
            problem = problem or _no_image(member, data, captioned, stems)
            yield Entry(member.name, data, member.size, problem=problem)
            continue
        place = places[member.name]
        label = labels.get(place.class_name) if place.class_name else None
        texts = captioned.of(member.name)
        if any(map(is_damaged, texts)):
            problem = problem or Problem("caption not UTF-8", "a caption of this image is not UTF-8 text")
        yield Entry(member.name, data, member.size, label, texts, place.split, problem)
    for line, reason in captioned.damaged:
        yield Entry(line, None, 0, problem=Problem(CAPTIONS_NOT_READ, reason))


def _stems(places: dict[str, Place]) -> set[str]:
    """File names of the images without suffix, case-folded."""
    return {composed(posixpath.splitext(posixpath.basename(name))[0]).casefold() for name in places}


def _no_image(member: Member, data: bytes | None, captioned: captions.Captions, stems: set[str]) -> Problem:
    """The problem of a file that is not an image: it seems to hold captions, or is another file."""
    suspicion = captioned.unread.get(member.name) or captions.suspicion(member.name, data, stems)
    if suspicion:
        return Problem(CAPTIONS_NOT_READ, suspicion)
    return Problem(NO_IMAGE_FILE, f"'{_suffix(member)}' is not the suffix of an image")


def _places(images: list[str], classes: dict[str, str]) -> tuple[dict[str, Place], list[str]]:
    """Split and class of each image, and messages about folders that could be either.

    `classes` maps images to the class in their sidecar file, which takes precedence over the folder.
    """
    folders = dict.fromkeys(posixpath.dirname(name) for name in images)
    as_class, notes = _classes_named_like_splits(list(folders))
    at = {folder: _place(folder, as_class) for folder in folders}
    settled = settle_splits({place.split for place in at.values()})
    found = {}
    for name in images:
        place = at[posixpath.dirname(name)]
        found[name] = Place(settled[place.split], classes.get(name) or place.class_name)
    return found, notes


def _place(folder: str, as_class: set[str]) -> Place:
    """Split and class of the images in a folder, by its path."""
    parts = folder.split("/") if folder else []
    above = ["/".join(parts[: depth + 1]) for depth in range(len(parts))]
    splits = [None if path in as_class else _split_named(path) for path in above]
    innermost = composed(parts[-1]) if parts and not (splits[-1] or _is_shard(parts[-1])) else None
    return Place(next(filter(None, splits), None), innermost)


def _classes_named_like_splits(folders: list[str]) -> tuple[set[str], list[str]]:
    """Folders that are named like a split but are classes (bus, car, train), and messages about the decision.

    Such a folder has other image folders beside it, but not both a training split and a held-out one.
    """
    found, notes = set(), []
    for beside in _siblings(folders).values():
        others = sorted(folder for folder, own in beside.items() if own and not _split_named(folder))
        named = sorted(folder for folder, own in beside.items() if own and _split_named(folder))
        if not (others and named) or any(map(_is_shard, [*others, *named])):
            continue
        splits = {_split_named(folder) for folder in beside} - {None}
        if len(splits) > 1 and "train" in splits:
            notes.append(
                f"{', '.join(named)} beside {', '.join(others[:3])} count as splits, not as classes; rename them if "
                "they are classes"
            )
        elif not any(other.startswith(f"{folder}/") for folder in named for other in folders):
            found |= set(named)
            notes.append(
                f"{', '.join(named)} beside {', '.join(others[:3])} count as classes, not as splits, because no other "
                "split lies beside them; if they are splits, add the missing one (train and test)"
            )
    return found, notes


def _siblings(folders: list[str]) -> dict[str, dict[str, bool]]:
    """Folder -> its subfolders, and whether they directly hold images."""
    inside: dict[str, dict[str, bool]] = {}
    for folder in folders:
        path, holds = folder, True
        while path != posixpath.dirname(path):  # the folder of "" is "", that of "/" is "/"
            inside.setdefault(posixpath.dirname(path), {}).setdefault(path, False)
            inside[posixpath.dirname(path)][path] |= holds
            path, holds = posixpath.dirname(path), False
    return inside


def _split_named(folder: str) -> str | None:
    """The split whose name is the last part of a path, or None."""
    return SPLITS.get(_split_word(posixpath.basename(folder)))


def _is_shard(folder: str) -> bool:
    return folder.lower().endswith(tars.SHARD)


def _split_word(folder: str) -> str:
    """The part of a folder name that may name a split; for a shard such as train-000000.tar its first word."""
    return re.split(r"[-_.]", folder.lower())[0] if _is_shard(folder) else folder.lower()


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorting key that puts "10" after "9"."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name) if part] + [
        (0, name)
    ]


def _suffix(member: Member) -> str:
    return posixpath.splitext(member.name)[1].lower()
