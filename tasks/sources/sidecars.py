"""What lies beside an image under its own name, as in webdataset shards: captions, class.

1.jpg   the image
1.txt   its captions: each line is a caption, empty lines are skipped (1.caption likewise)
1.json  an object whose "caption", or another usual name, is a caption or a list of them; read where there is no text.
        A caption here may go over several lines
1.cls   its class

Instead of 1.txt the file may be called 1.jpg.txt, or lie in a folder `captions` (or texts, txt, prompts) beside the
folder of the image or beside the image. A text of nothing but rows of five or more numbers holds boxes, not captions.
"""

from __future__ import annotations

import itertools
import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tasks.sources.archives import Member
from tasks.sources.caption_documents import captions_in, mentions_caption
from tasks.sources.entry import Problem
from tasks.sources.text_files import composed, decoded, is_damaged, lines, parsed

TEXTS, OBJECTS, CLASSES = {".txt", ".caption"}, {".json"}, {".cls"}
FOLDERS = {"caption", "captions", "text", "texts", "txt", "prompt", "prompts"}
MAX_BYTES = 1 << 20
_PARAGRAPHS = re.compile(r"\S[^\S\r\n]*(\r\n|\n|\r)[^\S\r\n]*(\r\n|\n|\r)\s*\S")
_BOXES = re.compile(r"[-+.\deE]+(\s+[-+.\deE]+){4,}")


@dataclass
class Sidecars:
    """What the files beside images say, by the path of the image."""

    files: set[str] = field(default_factory=set)
    """Names of the files that were understood; others are inputs like any other."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    """Files that should say something and were not understood, with the reason."""
    several: dict[str, int] = field(default_factory=dict)
    """Text files of several captions, with their number."""
    wrapped: list[str] = field(default_factory=list)
    """Those of them that look like one text that is wrapped by hand."""


def beside(members: list[Member], images: list[str]) -> dict[Member, list[str]]:
    """The members that lie beside images under their name, or in a folder of captions, each with its images."""
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
    """Which of the folders of a path, counted from the top, are folders of captions."""
    if posixpath.splitext(name)[1].lower() in CLASSES:
        return []
    return [place for place, folder in enumerate(name.split("/")[:-1]) if folder.lower() in FOLDERS]


Place = tuple[str, str]
"""The folders above a left-out one; the folders below it and the stem of the file."""


def _caption_places(name: str) -> Iterator[Place]:
    parts = composed(posixpath.splitext(name)[0]).split("/")
    for place in _caption_folders(name):
        yield "/".join(parts[:place]), "/".join(parts[place + 1 :])


def _places(images: list[str]) -> dict[Place, list[str]]:
    """Images by their path without one of its folders, and by their whole path cut in two."""
    places: dict[Place, list[str]] = {}
    for image in images:
        parts = composed(posixpath.splitext(image)[0]).split("/")
        for place in range(len(parts)):
            for rest in (place, place + 1) if place < len(parts) - 1 else (place,):
                places.setdefault(("/".join(parts[:place]), "/".join(parts[rest:])), []).append(image)
    return places


def read(files: Iterable[tuple[Member, bytes | Problem]], owners: dict[str, list[str]]) -> Sidecars:
    """Contents of the members that `beside` found, and the images of each by its name -> what they say.

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
            found.unread[member.name] = "the name of a class is no UTF-8 text"
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
    """Remember a text of several captions, and whether it looks like one caption: it has paragraphs, or a sentence
    that begins in one line and goes on in the next."""
    found.several[name] = len(captions)
    paragraphs = _PARAGRAPHS.search(text) is not None
    pairs = itertools.pairwise(captions)
    if paragraphs or any(one[0].isupper() and one[-1] not in ".!?" and after[0].islower() for one, after in pairs):
        found.wrapped.append(name)


def _of_object(text: str) -> list[str]:
    """Captions in a JSON object. Raises `ValueError` where it is none, or holds captions in another way."""
    said = parsed(text)
    if not isinstance(said, dict):
        raise ValueError("it holds no JSON object with a caption")
    captions = list(captions_in(said))
    if not captions and mentions_caption(said):
        raise ValueError("no key is called caption, text or prompt, or its value is no text")
    return captions
