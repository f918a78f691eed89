"""Tables of captions beside images: found, read and joined by file name."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from tasks.formats import decoding
from tasks.runtime.stage import StageError
from tasks.sources.archives import Member
from tasks.sources.entry import Problem

SUFFIXES = (".csv", ".tsv")
DELIMITERS = ",\t;|"
FILE_COLUMNS = {"file", "filename", "file_name", "image", "image_name", "image_file", "image_path", "img", "path"}
TEXT_COLUMNS = {"caption", "captions", "text", "description", "prompt", "sentence", "comment"}
MAX_BYTES = 1 << 30
MAX_FIELD = 1 << 20


@dataclass
class Captions:
    """Captions by the path of their image."""

    tables: set[str] = field(default_factory=set)
    """Names of the files that they came from."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    unmatched: int = 0
    """Lines that name no image."""

    def of(self, image: str) -> tuple[str, ...]:
        """Captions of an image, in the order of the tables."""
        return tuple(self.texts.get(image, ()))


def is_table(name: str) -> bool:
    """Whether a file may hold captions, by its name."""
    return name.lower().endswith(SUFFIXES)


def is_damaged(text: str) -> bool:
    """Whether a caption held bytes that are no UTF-8 text."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def read(tables: Iterable[tuple[Member, bytes | Problem]], images: list[str]) -> Captions:
    """Join every table that has a column of file names and one of captions with the paths in `images`.

    A name is looked up as a path from the table's folder, from the top, and as the bare name of one image.
    Raises `StageError` where a name fits several images, or no line of a table fits any.
    """
    whole = set(images)
    by_name: dict[str, list[str]] = {}
    for path in images:
        by_name.setdefault(posixpath.basename(path), []).append(path)
    captions = Captions()
    for member, content in tables:
        if isinstance(content, Problem):
            raise StageError(f"the table {member.name} cannot be read ({content.reason}, {content.detail}); repair it")
        matched = unmatched = 0
        for name, text in _lines(member.name, content):
            captions.tables.add(member.name)
            image = _find(name, member.name, whole, by_name)
            if image is None:
                unmatched += 1
                continue
            matched += 1
            if text:
                captions.texts.setdefault(image, []).append(text)
        if unmatched and not matched:
            raise StageError(
                f"{member.name} names none of the {len(images)} images; its file names must be those of the images"
            )
        captions.unmatched += unmatched
    return captions


def _find(name: str, table: str, whole: set[str], by_name: dict[str, list[str]]) -> str | None:
    for path in ((PurePosixPath(table).parent / name).as_posix(), PurePosixPath(name).as_posix()):
        if path in whole:
            return path
    same = by_name.get(PurePosixPath(name).name, [])
    if len(same) > 1:
        raise StageError(
            f"{table} says '{name}', which may be {same[0]} or {same[1]}; write the path of the image from the table"
        )
    return same[0] if same else None


def _lines(table: str, content: bytes) -> Iterator[tuple[str, str]]:
    """(file name, caption) of every line; nothing where the table has no such columns.

    Bytes that are no UTF-8 become lone surrogates, which `is_damaged` tells.
    """
    text = content.decode("utf-8-sig", "surrogateescape")
    first = text.split("\n", 1)[0]
    if "\0" in first or is_damaged(first):
        raise StageError(f"{table} is no UTF-8 text; save it as UTF-8")
    delimiter = max(DELIMITERS, key=first.count)
    csv.field_size_limit(MAX_FIELD)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        header = next(rows, [])
        columns = _columns(header)
        if columns is None:
            return
        file, caption = columns
        if _is_image(header[file]):
            yield header[file].strip(), header[caption].strip()
        for row in rows:
            if row:
                name, its = (row[column].strip() if column < len(row) else "" for column in (file, caption))
                yield name, its
    except csv.Error as error:
        raise StageError(f"{table} is no readable table ({error}, line {rows.line_num}); repair it") from None


def _columns(header: list[str]) -> tuple[int, int] | None:
    """Positions of the file names and of the captions; a table without a header begins with an image's name."""
    names = [name.strip().lower() for name in header]
    file = next((position for position, name in enumerate(names) if name in FILE_COLUMNS), None)
    caption = next((position for position, name in enumerate(names) if name in TEXT_COLUMNS), None)
    if file is not None and caption is not None:
        return file, caption
    return (0, 1) if len(header) > 1 and _is_image(header[0]) else None


def _is_image(name: str) -> bool:
    return PurePosixPath(name.strip()).suffix.lower() in decoding.SUFFIXES
