"""Sidecar files: captions and classes of one image in files of the same name, as in webdataset shards.

1.jpg   the image
1.txt   captions: each line is a caption, empty lines are skipped (also 1.caption)
1.json  an object with a caption or a list of captions under "caption" or another usual key, used if the image has no
        text file; a caption in JSON may contain line breaks
1.cls   class name

1.txt may also be called 1.jpg.txt, or lie in a folder `captions` (or texts, txt, prompts) beside the folder of the
image or beside the image. A text that consists of rows of five or more numbers holds boxes, not captions.
"""

from __future__ import annotations

import itertools
import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tasks.sources.caption_documents import captions_in, mentions_caption
from tasks.sources.entry import Problem
from tasks.sources.text_files import composed, decoded, is_damaged, lines, parsed

if TYPE_CHECKING:
    from tasks.sources.archive_members import Member

TEXTS, OBJECTS, CLASSES = {".txt", ".caption"}, {".json"}, {".cls"}
FOLDERS = {"caption", "captions", "text", "texts", "txt", "prompt", "prompts"}
MAX_BYTES = 1 << 20
_PARAGRAPHS = re.compile(r"\S[^\S\r\n]*(\r\n|\n|\r)[^\S\r\n]*(\r\n|\n|\r)\s*\S")
_BOXES = re.compile(r"[-+.\deE]+(\s+[-+.\deE]+){4,}")


@dataclass
class Sidecars:
    """Content of the sidecar files."""

    files: set[str] = field(default_factory=set)
    """Names of the files that were read; other files are ordinary inputs."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Captions by the path of an image."""
    classes: dict[str, str] = field(default_factory=dict)
    """Class name by the path of an image."""
    unread: dict[str, str] = field(default_factory=dict)
    """Reason by name of a file that could not be read."""
    several: dict[str, int] = field(default_factory=dict)
    """Number of captions by name of a text file with more than one."""
    wrapped: list[str] = field(default_factory=list)
    """Files among `several` that may hold a single caption with line breaks."""


def beside(members: list[Member], images: list[str]) -> dict[Member, list[str]]:
    """Find the sidecar files among the members of an archive, each with the images that it belongs to."""
    kinds = tuple(TEXTS | OBJECTS | CLASSES)
    candidates = [member for member in members if member.name.lower().endswith(kinds) and not member.problem]
    if not candidates:
        return {}
    stems: dict[str, list[str]] = {}
    for image in images:
        for stem in (posixpath.splitext(image)[0], image):
            stems.setdefault(composed(stem), []).append(image)
    found = {member: stems.get(composed(posixpath.splitext(member.name)[0]), []) for member in candidates}
    lost = [member for member, owners in found.items() if not owners and _caption_folders(member.name)]
    places = _places(images) if lost else {}
    for member in lost:
        owners = {image: None for place in _caption_places(member.name) for image in places.get(place, ())}
        if len({posixpath.dirname(image) for image in owners}) == 1:
            found[member] = list(owners)
    return {member: owners for member, owners in found.items() if owners}


def _caption_folders(name: str) -> list[int]:
    """Positions of the parts of a path that are caption folders."""
    if posixpath.splitext(name)[1].lower() in CLASSES:
        return []
    return [place for place, folder in enumerate(name.split("/")[:-1]) if folder.lower() in FOLDERS]


Place = tuple[str, str]
"""A path without one of its folders, as the part before it and the part after it, without suffix."""


def _caption_places(name: str) -> Iterator[Place]:
    parts = composed(posixpath.splitext(name)[0]).split("/")
    for place in _caption_folders(name):
        yield "/".join(parts[:place]), "/".join(parts[place + 1 :])


def _places(images: list[str]) -> dict[Place, list[str]]:
    """Images by each path that results from leaving out one of their folders, or none."""
    places: dict[Place, list[str]] = {}
    for image in images:
        parts = composed(posixpath.splitext(image)[0]).split("/")
        for place in range(len(parts)):
            for rest in (place, place + 1) if place < len(parts) - 1 else (place,):
                places.setdefault(("/".join(parts[:place]), "/".join(parts[rest:])), []).append(image)
    return places


def read(files: Iterable[tuple[Member, bytes | Problem]], owners: dict[str, list[str]]) -> Sidecars:
    """Read the sidecar files found by `beside`; `owners` maps the name of a file to its images.

    Bytes that cannot be decoded become lone surrogates.
    """
    found, objects = Sidecars(), Sidecars()
    for member, content in files:
        suffix = posixpath.splitext(member.name)[1].lower()
        if isinstance(content, Problem):
            found.unread[member.name] = f"{content.reason}, {content.detail}"
            continue
        text = decoded(content)
        try:
            captions = _of_object(text) if suffix in OBJECTS else lines(text)
        except ValueError as error:
            found.unread[member.name] = str(error)
            continue
        if suffix in TEXTS and captions and all(map(_BOXES.fullmatch, captions)):
            continue
        if suffix in CLASSES and is_damaged(text):
            found.unread[member.name] = "the class name is not UTF-8 text"
            continue
        found.files.add(member.name)
        if suffix in TEXTS and len(captions) > 1:
            _note_lines(member.name, text, captions, found)
        for image in owners[member.name]:
            if suffix in CLASSES:
                found.classes[image] = composed(text.strip())
            else:
                target = objects if suffix in OBJECTS else found
                target.texts.setdefault(image, []).extend(captions)
    found.texts = objects.texts | found.texts
    return found


def _note_lines(name: str, text: str, captions: list[str], found: Sidecars) -> None:
    """Record a text file with several captions, and whether it may be a single caption.

    It may be if it has paragraphs, or a sentence that continues on the next line.
    """
    found.several[name] = len(captions)
    paragraphs = _PARAGRAPHS.search(text) is not None
    pairs = itertools.pairwise(captions)
    if paragraphs or any(one[0].isupper() and one[-1] not in ".!?" and after[0].islower() for one, after in pairs):
        found.wrapped.append(name)


def _of_object(text: str) -> list[str]:
    """Captions in a JSON object. Raises `ValueError` for other JSON, and for captions under unsupported keys."""
    record = parsed(text)
    if not isinstance(record, dict):
        raise ValueError("it holds no JSON object with a caption")
    captions = list(captions_in(record))
    if not captions and mentions_caption(record):
        raise ValueError("no key is called caption, text or prompt, or its value is not a string")
    return captions
