"""What lies beside an image under its own name, as in webdataset shards: captions, class.

1.jpg   the image
1.txt   its captions, one a line (1.caption likewise)
1.json  an object whose "caption", or another usual name, is a caption or a list of them; read where there is no text
1.cls   its class
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tasks.sources.archives import Member
from tasks.sources.captions import TEXT_COLUMNS
from tasks.sources.entry import Problem

TEXTS, OBJECTS, CLASSES = {".txt", ".caption"}, {".json"}, {".cls"}
MAX_BYTES = 1 << 20


@dataclass
class Sidecars:
    """What the files beside images say, by the path of the image."""

    files: set[str] = field(default_factory=set)
    """Names of the files that were understood; others are inputs like any other."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)


def beside(members: list[Member], images: list[str]) -> list[Member]:
    """The members that lie beside an image under its name."""
    kinds = tuple(TEXTS | OBJECTS | CLASSES)
    candidates = [member for member in members if member.name.lower().endswith(kinds) and not member.problem]
    stems = {posixpath.splitext(image)[0] for image in images} if candidates else set()
    return [member for member in candidates if posixpath.splitext(member.name)[0] in stems]


def read(files: Iterable[tuple[Member, bytes | Problem]], images: list[str]) -> Sidecars:
    """Contents of the members that `beside` found -> what they say. Bytes that are no UTF-8 become lone surrogates."""
    by_stem: dict[str, list[str]] = {}
    for image in images:
        by_stem.setdefault(posixpath.splitext(image)[0], []).append(image)
    found, objects = Sidecars(), Sidecars()
    for member, content in files:
        stem, suffix = posixpath.splitext(member.name)
        if isinstance(content, Problem):
            continue
        text = content.decode("utf-8-sig", "surrogateescape")
        captions = _of_object(text) if suffix.lower() in OBJECTS else _lines(text)
        if captions is None:
            continue
        found.files.add(member.name)
        for image in by_stem[stem]:
            if suffix.lower() in CLASSES:
                found.classes[image] = text.strip()
            else:
                target = objects if suffix.lower() in OBJECTS else found
                target.texts.setdefault(image, []).extend(captions)
    found.texts = objects.texts | found.texts
    return found


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _of_object(text: str) -> list[str] | None:
    """Captions in a JSON object; None where it is none."""
    try:
        said: Any = json.loads(text)
    except ValueError:
        return None
    if not isinstance(said, dict):
        return None
    values = [value for name, value in said.items() if name.lower() in TEXT_COLUMNS]
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]
