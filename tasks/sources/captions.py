"""Files of captions beside images: found, read and joined by file name.

Read are CSV and its relatives (`tasks.sources.caption_tables`), JSON lines and JSON documents
(`tasks.sources.caption_documents`). A file that names images or is called like captions, and is in none of the forms
read here, is reported with the reason.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tasks.runtime.stage import StageError
from tasks.sources import archives, caption_documents, caption_tables
from tasks.sources.archives import Member
from tasks.sources.caption_tables import DamagedLine, Line, UnreadError
from tasks.sources.entry import Problem
from tasks.sources.image_names import Names
from tasks.sources.text_files import composed, decoded

TABLES, LINES, DOCUMENTS, TEXTS = (".csv", ".tsv"), (".jsonl", ".ndjson"), (".json",), (".txt",)
OTHER_TABLES = (".parquet", ".arrow", ".feather", ".xlsx", ".xls", ".ods", ".pkl", ".db", ".sqlite")
OTHER_TEXTS = (".caption", ".captions", ".text", ".prompt", ".tags", ".md", ".yaml", ".yml", ".toml")
MAX_BYTES, MAX_DOCUMENT_BYTES = 1 << 30, 1 << 28
_SAYS_CAPTIONS = re.compile(r"(^|[^a-z])(caption|cap|prompt)s?([^a-z]|$)")
_SAYS_METADATA = re.compile(r"metadata|caption|prompt")
_WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass
class Joined:
    """What became of one file of captions."""

    key: str
    """Its name."""
    captions: int = 0
    """Captions that it has for the images."""
    matched: int = 0
    """Its lines that name an image."""
    unmatched: int = 0
    first_unmatched: str = ""


@dataclass
class Captions:
    """Captions by the path of their image."""

    files: list[Joined] = field(default_factory=list)
    """The files that they came from."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    """Files that seem to hold captions and were not read, with the reason."""
    damaged: list[tuple[str, str]] = field(default_factory=list)
    """Lines of files of lines that could not be read: file and number, and the reason."""

    @property
    def unmatched(self) -> int:
        """Lines that name no image."""
        return sum(file.unmatched for file in self.files)

    def of(self, image: str) -> tuple[str, ...]:
        """Captions of an image, in the order of the files."""
        return tuple(self.texts.get(image, ()))

    def described(self) -> list[dict[str, Any]]:
        """The files that were read, for the index."""
        return [asdict(file) for file in self.files]


def may_hold_captions(name: str) -> bool:
    """Whether a file may hold captions of many images, by its name."""
    lower = name.lower()
    return lower.endswith((*TABLES, *LINES, *DOCUMENTS)) or (lower.endswith(TEXTS) and _says_captions(lower))


def _says_captions(name: str) -> bool:
    return _SAYS_CAPTIONS.search(posixpath.basename(name).lower()) is not None


def read(files: Iterable[tuple[Member, bytes | Problem]], images: Sequence[str]) -> Captions:
    """Join every file that names images and their captions with the paths in `images`.

    Raises `StageError` where a table is damaged, fits no image, or has a name that fits several.
    """
    names, captions = Names(images), Captions()
    for member, content in files:
        if isinstance(content, Problem) and member.name.lower().endswith(TABLES):
            raise StageError(f"the table {member.name} cannot be read ({content.reason}, {content.detail}); repair it")
        try:
            _join(member.name, content, names, captions)
        except UnreadError as unread:
            captions.unread[member.name] = str(unread)
    return captions


def _join(file: str, content: bytes | Problem, names: Names, captions: Captions) -> None:
    """Take the captions of one file. Raises `UnreadError` where it seems to hold some that are not read."""
    lines = _lines_of(file, content, names)
    if lines is None:
        return
    joined, damaged = Joined(file), []
    for line in lines:
        if isinstance(line, DamagedLine):
            damaged.append((f"{file}, line {line.number}", line.reason))
            continue
        image = names.find(line.name, file)
        if image is None:
            joined.unmatched += 1
            joined.first_unmatched = joined.first_unmatched or f"line {line.number}: {archives.text(line.name)}"
            continue
        joined.matched += 1
        joined.captions += len(line.texts)
        captions.texts.setdefault(image, []).extend(line.texts)
    if joined.unmatched and not joined.matched:
        sentence = f"names none of the {len(names.paths)} images; its file names must be those of the images"
        if file.lower().endswith((*TABLES, *LINES)):
            raise StageError(f"{file} {sentence}")
        raise UnreadError(f"it {sentence}")
    captions.files.append(joined)
    captions.damaged += damaged


def _lines_of(file: str, content: bytes | Problem, names: Names) -> list[Line | DamagedLine] | None:
    """What a file says, line by line; None where it has nothing to do with captions."""
    lower = file.lower()
    if isinstance(content, Problem):
        raise UnreadError(f"{content.reason}, {content.detail}")
    if lower.endswith(DOCUMENTS) and len(content) > MAX_DOCUMENT_BYTES:
        raise UnreadError(f"{len(content)} bytes of JSON are over the limit of {MAX_DOCUMENT_BYTES}")
    text = decoded(content)
    try:
        if lower.endswith(DOCUMENTS):
            found: Iterable[Any] | None = caption_documents.read_document(text, names)
        elif lower.endswith(LINES):
            found = caption_documents.read_lines(text)
        else:
            found = caption_tables.read(file, text, names)
    except ValueError as error:
        raise UnreadError(str(error)) from None
    if found is None and _says_captions(file):
        raise UnreadError("it is called like captions, but names no images in a form that is known here")
    return None if found is None else list(found)


def suspicion(name: str, content: bytes | None, stems: set[str]) -> str | None:
    """Why a file that was not read seems to hold captions, or None. `stems` are those of the images, case-folded."""
    stem, suffix = posixpath.splitext(composed(name).casefold())
    if suffix in OTHER_TABLES and _SAYS_METADATA.search(posixpath.basename(stem)):
        return f"tables of captions are read as CSV, TSV or JSON, not as {suffix}"
    if suffix not in (*TEXTS, *OTHER_TEXTS) or not (content is None or holds_words(decoded(content))):
        return None
    if posixpath.basename(stem) in stems:
        return "it has the name of an image, but does not lie beside it or in a folder 'captions' beside the images"
    if any(map(_says_captions, posixpath.dirname(stem).split("/"))):
        return "it lies in a folder of captions, and no image has its name"
    return "it is called like captions, but is in no form that is known here" if _says_captions(stem) else None


def holds_words(text: str) -> bool:
    """Whether a text is more than numbers, as the boxes of detection data sets are."""
    return _WORD.search(text) is not None
