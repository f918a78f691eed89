"""Caption files: files that hold captions of many images, joined with the images by name.

Supported are CSV, TSV and similar tables (`tasks.sources.caption_tables`), JSON lines and JSON documents
(`tasks.sources.caption_documents`). A file that names images or has "caption" in its name, but is in another format,
is reported with the reason.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tasks.pictures.index import CaptionFile
from tasks.runtime.disk import printable_name
from tasks.runtime.errors import StageError
from tasks.sources import caption_documents, caption_tables
from tasks.sources.caption_tables import DamagedLine, Line, UnreadError
from tasks.sources.entry import Problem
from tasks.sources.image_names import Names
from tasks.sources.text_files import composed, decoded

if TYPE_CHECKING:
    from tasks.sources.archive_members import Member

TABLES, LINES, DOCUMENTS, TEXTS = (".csv", ".tsv"), (".jsonl", ".ndjson"), (".json",), (".txt",)
OTHER_TABLES = (".parquet", ".arrow", ".feather", ".xlsx", ".xls", ".ods", ".pkl", ".db", ".sqlite")
OTHER_TEXTS = (".caption", ".captions", ".text", ".prompt", ".tags", ".md", ".yaml", ".yml", ".toml")
MAX_BYTES, MAX_DOCUMENT_BYTES = 1 << 30, 1 << 28
_CAPTION_NAME = re.compile(r"(^|[^a-z])(caption|cap|prompt)s?([^a-z]|$)")
_METADATA_NAME = re.compile(r"metadata|caption|prompt")
_WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass
class Captions:
    """Captions of all images."""

    files: list[CaptionFile] = field(default_factory=list)
    """The caption files that were read."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Captions by the path of an image."""
    unread: dict[str, str] = field(default_factory=dict)
    """Reason by name of a file that seems to hold captions and was not read."""
    damaged: list[tuple[str, str]] = field(default_factory=list)
    """File and number of each line that could not be read, and the reason."""

    @property
    def unmatched(self) -> int:
        """Number of lines that name no image."""
        return sum(file.unmatched for file in self.files)

    def of(self, image: str) -> tuple[str, ...]:
        """Captions of an image, in the order of the files."""
        return tuple(self.texts.get(image, ()))


def may_hold_captions(name: str) -> bool:
    """Whether the name of a file is that of a possible caption file."""
    lower = name.lower()
    return lower.endswith((*TABLES, *LINES, *DOCUMENTS)) or (lower.endswith(TEXTS) and _is_caption_name(lower))


def _is_caption_name(name: str) -> bool:
    return _CAPTION_NAME.search(posixpath.basename(name).lower()) is not None


def read(files: Iterable[tuple[Member, bytes | Problem]], images: Sequence[str]) -> Captions:
    """Read caption files and join them with the paths in `images`.

    Raises `StageError` if a table is damaged, names none of the images, or has a name that matches several.
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
    """Add the captions of one file. Raises `UnreadError` if it seems to hold captions but cannot be read."""
    lines = _lines_of(file, content, names)
    if lines is None:
        return
    matched = unmatched = texts = 0
    first_unmatched, damaged = "", []
    for line in lines:
        if isinstance(line, DamagedLine):
            damaged.append((f"{file}, line {line.number}", line.reason))
            continue
        image = names.find(line.name, file)
        if image is None:
            unmatched += 1
            first_unmatched = first_unmatched or f"line {line.number}: {printable_name(line.name)}"
            continue
        matched += 1
        texts += len(line.texts)
        captions.texts.setdefault(image, []).extend(line.texts)
    if unmatched and not matched:
        sentence = f"names none of the {len(names.paths)} images; its file names must be those of the images"
        if file.lower().endswith((*TABLES, *LINES)):
            raise StageError(f"{file} {sentence}")
        raise UnreadError(f"it {sentence}")
    captions.files.append(CaptionFile(file, texts, matched, unmatched, first_unmatched))
    captions.damaged += damaged


def _lines_of(file: str, content: bytes | Problem, names: Names) -> list[Line | DamagedLine] | None:
    """The lines of a caption file; None if the file holds no captions."""
    lower = file.lower()
    if isinstance(content, Problem):
        raise UnreadError(f"{content.reason}, {content.detail}")
    if lower.endswith(DOCUMENTS) and len(content) > MAX_DOCUMENT_BYTES:
        raise UnreadError(f"{len(content)} bytes of JSON are over the limit of {MAX_DOCUMENT_BYTES}")
    text = decoded(content)
    try:
        if lower.endswith(DOCUMENTS):
            found: Iterable[Line | DamagedLine] | None = caption_documents.read_document(text, names)
        elif lower.endswith(LINES):
            found = caption_documents.read_lines(text)
        else:
            found = caption_tables.read(file, text, names)
    except ValueError as error:
        raise UnreadError(str(error)) from None
    if found is None and _is_caption_name(file):
        raise UnreadError("it has the name of a caption file, but names no images in a supported format")
    return None if found is None else list(found)


def suspicion(name: str, content: bytes | None, stems: set[str]) -> str | None:
    """Why a file that was not read seems to hold captions, or None.

    `stems` are the file names of the images without suffix, case-folded.
    """
    stem, suffix = posixpath.splitext(composed(name).casefold())
    if suffix in OTHER_TABLES and _METADATA_NAME.search(posixpath.basename(stem)):
        return f"tables of captions are read as CSV, TSV or JSON, not as {suffix}"
    if suffix not in (*TEXTS, *OTHER_TEXTS) or not (content is None or holds_words(decoded(content))):
        return None
    if posixpath.basename(stem) in stems:
        return "it has the name of an image, but does not lie beside it or in a folder 'captions' beside the images"
    if any(map(_is_caption_name, posixpath.dirname(stem).split("/"))):
        return "it lies in a folder of captions, but no image has the same name"
    return "it has the name of a caption file, but an unsupported format" if _is_caption_name(stem) else None


def holds_words(text: str) -> bool:
    """Whether a text contains words; label files of detection datasets hold only numbers."""
    return _WORD.search(text) is not None
