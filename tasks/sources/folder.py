"""The source `folder`: one's own images, in a folder, a zip or a tar.

What the names say:
- folders named train, test or val (and their usual synonyms), in any case, are published splits; one that holds images
  itself and lies beside other such folders is a class (bus, car, train), unless a train and a test folder lie there;
- otherwise the innermost folder is the class, where there are at least two different ones;
- webdataset shards (.tar) are looked into; train-000000.tar is a shard of the split train.

What captions them (names are compared in Unicode's form NFC):
- tables of file names and captions: .csv, .tsv, .jsonl, .json, see `tasks.sources.captions`; several lines for one
  image are several captions;
- text files beside an image under its name, or in a folder `captions` beside it: each line is a caption; a caption that
  goes over several lines is written as one line, or into a .json file (see `tasks.sources.sidecars`, also for classes).

What looks like captions and is not read goes to quarantine, with the reason.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tasks.pictures import decoding
from tasks.runtime.disk import require_space
from tasks.runtime.stage import StageError
from tasks.sources import archives, captions, sidecars
from tasks.sources.archives import Member
from tasks.sources.entry import SPLITS, Entry, Problem, Source, settle_splits
from tasks.sources.quarantine import CAPTIONS_NOT_READ, NO_IMAGE_FILE
from tasks.sources.sidecars import Sidecars
from tasks.sources.text_files import composed, is_damaged


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
    found = _pictures_by_content(file, members)
    images = [member.name for member in members if _suffix(member) in decoding.SUFFIXES or member.name in found]
    around = sidecars.beside(members, images)
    tables = [
        member
        for member in members
        if member not in around and not member.problem and captions.may_hold_captions(member.name)
    ]
    captioned = captions.read(archives.read_members(file, tables, captions.MAX_BYTES) if tables else (), images)
    owners = {member.name: its for member, its in around.items()}
    said = sidecars.read(archives.read_members(file, list(around), sidecars.MAX_BYTES) if around else (), owners)
    for image, texts in said.texts.items():
        captioned.texts.setdefault(image, []).extend(texts)
    captioned.unread |= said.unread
    understood = {joined.key for joined in captioned.files} | said.files
    inputs = [member for member in members if member.name not in understood]
    places, notes = _places(images, said.classes)
    folders = {place.folder for place in places.values() if place.folder}
    classes = sorted(folders, key=_natural) if len(folders) > 1 else []
    contents = archives.read_members(file, inputs, max_bytes)
    entries = _entries(contents, places, {name: label for label, name in enumerate(classes)}, captioned)
    notes += _caption_notes(captioned, said)
    count = len(inputs) + len(captioned.damaged)
    return Source(classes, count, entries, captioned.unmatched, captioned.described(), tuple(notes))


def _pictures_by_content(file: Path, members: list[Member]) -> set[str]:
    """Names of the members that begin as pictures do, of those whose suffix says nothing."""
    known = decoding.SUFFIXES | decoding.OTHER_SUFFIXES
    unknown = [member for member in members if member.size and _suffix(member) not in known]
    heads = archives.read_heads(file, unknown, decoding.HEAD_BYTES)
    return {member.name for member, head in heads if decoding.kind_of(head)}


def _caption_notes(captioned: captions.Captions, said: Sidecars) -> list[str]:
    """What a person should know about the captions that were read."""
    notes = [f"{joined.captions} captions from {joined.key}" for joined in captioned.files]
    notes += [
        f"{joined.unmatched} lines of {joined.key} name no image ({joined.first_unmatched})"
        for joined in captioned.files
        if joined.unmatched
    ]
    if said.several:
        first, lines = next(iter(said.several.items()))
        files = "caption file has" if len(said.several) == 1 else "caption files have"
        wrapped = (
            f", and {len(said.wrapped)} of them may be one wrapped text ({said.wrapped[0]})" if said.wrapped else ""
        )
        notes.append(
            f"{len(said.several)} {files} several lines, and each line is a caption of its own ({first}: {lines} "
            f"captions){wrapped}; write a caption that goes over several lines as one line"
        )
    return notes


def _entries(
    contents: Iterator[tuple[Member, bytes | Problem]],
    places: dict[str, Place],
    labels: dict[str, int],
    captioned: captions.Captions,
) -> Iterator[Entry]:
    stems: set[str] | None = None
    for member, content in contents:
        data, problem = (None, content) if isinstance(content, Problem) else (content, None)
        if member.name not in places:
            stems = _stems(places) if stems is None else stems
            problem = problem or _no_image(member, data, captioned, stems)
            yield Entry(member.name, data, member.size, problem=problem)
            continue
        place = places[member.name]
        label = labels.get(place.folder) if place.folder else None
        texts = captioned.of(member.name)
        if any(map(is_damaged, texts)):
            problem = problem or Problem("caption not UTF-8", "a caption of this image is no UTF-8 text")
        yield Entry(member.name, data, member.size, label, texts, place.split, problem)
    for line, reason in captioned.damaged:
        yield Entry(line, None, 0, problem=Problem(CAPTIONS_NOT_READ, reason))


def _stems(places: dict[str, Place]) -> set[str]:
    """Names of the images without folder and suffix, case-folded."""
    return {composed(posixpath.splitext(posixpath.basename(name))[0]).casefold() for name in places}


def _no_image(member: Member, data: bytes | None, captioned: captions.Captions, stems: set[str]) -> Problem:
    """Why a file that is no image is set aside: it seems to hold captions, or it is something else."""
    suspicion = captioned.unread.get(member.name) or captions.suspicion(member.name, data, stems)
    if suspicion:
        return Problem(CAPTIONS_NOT_READ, suspicion)
    return Problem(NO_IMAGE_FILE, f"'{_suffix(member)}' is no suffix of an image")


def _places(images: list[str], classes: dict[str, str]) -> tuple[dict[str, Place], list[str]]:
    """Published splits and classes of image paths, the class by a file beside the image or by its folder; and what a
    person should know about them."""
    folders = dict.fromkeys(posixpath.dirname(name) for name in images)
    as_class, notes = _classes_named_like_splits(list(folders))
    at = {folder: _place(folder, as_class) for folder in folders}
    settled = settle_splits({place.split for place in at.values()})
    found = {}
    for name in images:
        place = at[posixpath.dirname(name)]
        found[name] = Place(settled[place.split], classes.get(name) or place.folder)
    return found, notes


def _place(folder: str, as_class: set[str]) -> Place:
    """What the path of a folder says about the images in it."""
    parts = folder.split("/") if folder else []
    above = ["/".join(parts[: depth + 1]) for depth in range(len(parts))]
    splits = [None if path in as_class else _split_named(path) for path in above]
    innermost = composed(parts[-1]) if parts and not (splits[-1] or _is_shard(parts[-1])) else None
    return Place(next(filter(None, splits), None), innermost)


def _classes_named_like_splits(folders: list[str]) -> tuple[set[str], list[str]]:
    """Those folders of images that are called like a split and are classes, as bus, car and train: others lie beside
    them, and no training split together with a held-out one. And what a person should know about it."""
    found, notes = set(), []
    for beside in _siblings(folders).values():
        others = sorted(folder for folder, own in beside.items() if own and not _split_named(folder))
        named = sorted(folder for folder, own in beside.items() if own and _split_named(folder))
        if not (others and named) or any(map(_is_shard, [*others, *named])):
            continue
        splits = {_split_named(folder) for folder in beside} - {None}
        if len(splits) > 1 and "train" in splits:
            notes.append(
                f"{', '.join(named)} beside {', '.join(others[:3])} count as splits, not as classes; rename them where "
                "they are classes"
            )
        elif not any(other.startswith(f"{folder}/") for folder in named for other in folders):
            found |= set(named)
            notes.append(
                f"{', '.join(named)} beside {', '.join(others[:3])} count as classes, not as splits, because no other "
                "split lies beside them; where they are splits, add the other one (train and test)"
            )
    return found, notes


def _siblings(folders: list[str]) -> dict[str, dict[str, bool]]:
    """Folder -> the folders in it, and whether they hold images themselves."""
    inside: dict[str, dict[str, bool]] = {}
    for folder in folders:
        path, holds = folder, True
        while path != posixpath.dirname(path):  # the folder of "" is "", that of "/" is "/"
            inside.setdefault(posixpath.dirname(path), {}).setdefault(path, False)
            inside[posixpath.dirname(path)][path] |= holds
            path, holds = posixpath.dirname(path), False
    return inside


def _split_named(folder: str) -> str | None:
    """The split that the last part of a path is called like."""
    return SPLITS.get(_split_word(posixpath.basename(folder)))


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
