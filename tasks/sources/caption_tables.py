"""Caption files in CSV, TSV and similar formats -> lines of (image name, captions), and the types of these lines.

The delimiter is stated by `sep=` in the first line, or is the one of `DELIMITERS` that splits the first lines into a
column of file names and one of captions. With a header, columns are found by name; without one, the table must have
two columns, one with file names that have the suffix of an image.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.runtime.errors import StageError
from tasks.sources.image_names import Names, is_image_name
from tasks.sources.text_files import is_damaged

if TYPE_CHECKING:
    import _csv

DELIMITERS = ",\t;|"
FILE_COLUMNS = {
    *("file", "filename", "file_name", "filepath", "file_path"),
    *("image", "imagename", "image_name", "imagefile", "image_file", "imagepath", "image_path", "img", "img_path"),
    "path",
}
KEY_COLUMNS = {"id", "key", "name", "stem", "image_id", "imageid"}
"""Columns that may hold names of images without suffix."""
TEXT_COLUMNS = {"caption", "captions", "text", "description", "prompt", "sentence", "comment"}
MAX_FIELD = 1 << 20
SAMPLE_LINES, SAMPLE_CHARACTERS = 50, 1 << 18
"""Size of the beginning of a table that is searched for its columns."""
_SEPARATOR = re.compile(r'"?sep=(.)"?(\r\n|\n|\r|$)', re.IGNORECASE)
_INNER_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")


class UnreadError(Exception):
    """A file names images but cannot be read as captions, for the reason in the message."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a caption file: an image name and its captions."""

    number: int
    name: str
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DamagedLine:
    """A line that could not be read."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Layout:
    """Delimiter and columns of a table."""

    delimiter: str
    file: int
    """Position of the column of file names."""
    captions: tuple[int, ...]
    """Positions of the columns of captions."""
    width: int
    """Number of columns."""
    has_header: bool


def column_name(name: str) -> str:
    """Normalise the name of a column or key: "Image Path" and "imagePath" -> "image_path"."""
    return re.sub(r"\W+", "_", _INNER_CAPITAL.sub("_", name.strip())).lower()


def text_columns(names: list[str]) -> list[int]:
    """Positions of the caption columns: those with a usual name, or the only one whose last word is such a name."""
    usual = [position for position, name in enumerate(names) if name in TEXT_COLUMNS]
    by_word = [position for position, name in enumerate(names) if name.rpartition("_")[2] in TEXT_COLUMNS]
    return usual or (by_word if len(by_word) == 1 else [])


def read(table: str, text: str, names: Names) -> Iterator[Line] | None:
    """Read a table; None if no column names images.

    Raises `UnreadError` if the caption columns are ambiguous, `StageError` if the text is damaged.
    """
    if "\0" in text.partition("\n")[0] or is_damaged(text.partition("\n")[0]):
        raise StageError(f"{table} is not UTF-8 text; save it as UTF-8")
    csv.field_size_limit(MAX_FIELD)
    stated = _SEPARATOR.match(text)
    body, first = (text[stated.end() :], 1) if stated else (text, 0)
    layout = _layout(table, body, stated[1] if stated else None, names)
    return _lines(table, body, first, layout, names) if layout else None


def _layout(table: str, body: str, stated: str | None, names: Names) -> Layout | None:
    beginning = body[:SAMPLE_CHARACTERS]
    title = re.split("[\r\n]", beginning, maxsplit=1)[0]
    preferred = sorted(DELIMITERS, key=title.count, reverse=True)
    found: list[tuple[int, Layout]] = []
    reason = None
    for delimiter in [stated] if stated else preferred:
        try:
            sample = [row for row in itertools.islice(_reader(beginning, delimiter), SAMPLE_LINES) if row]
            cut_off = len(body) > SAMPLE_CHARACTERS and 1 < len(sample) < SAMPLE_LINES
            layout = _layout_of(sample[:-1] if cut_off else sample, delimiter, names)
        except csv.Error as error:
            raise StageError(f"{table} is not a readable table ({error}; is a quote not closed?); repair it") from None
        except UnreadError as unread:
            reason = reason or unread
            continue
        if layout:
            known = sum(layout.file < len(row) and names.has(row[layout.file]) for row in sample)
            found.append((known, layout))
    if reason and not found:
        raise reason
    return max(found, key=lambda candidate: candidate[0])[1] if found else None


def _layout_of(rows: list[list[str]], delimiter: str, names: Names) -> Layout | None:
    """The layout of the first rows of a table, split by one delimiter; None if no column names images."""
    if not rows or len(rows[0]) < 2:
        return None
    width = len(rows[0])
    if any(is_image_name(cell) for cell in rows[0]):
        file = next(position for position, cell in enumerate(rows[0]) if is_image_name(cell))
        if width > 2:
            raise UnreadError(
                f"it has no header, and the first line has {width} columns; add a header such as 'file_name,text', and "
                f"quote captions that contain '{delimiter}'"
            )
        return Layout(delimiter, file, (1 - file,), width, has_header=False)
    header = [column_name(cell) for cell in rows[0]]
    file_column = _file_column(header, rows[1:], names)
    if file_column is None:
        return None
    captions = text_columns(header)
    if not captions:
        if file_column != _file_by_content(header, rows[1:], names):
            return None  # a column called "path" or "image" that does not name images
        raise UnreadError(
            f"no column is called caption, text or prompt (found {', '.join(cell.strip() for cell in rows[0])})"
        )
    return Layout(delimiter, file_column, tuple(captions), width, has_header=True)


def _file_column(header: list[str], rows: list[list[str]], names: Names) -> int | None:
    usual = next((position for position, name in enumerate(header) if name in FILE_COLUMNS), None)
    return usual if usual is not None else _file_by_content(header, rows, names)


def _file_by_content(header: list[str], rows: list[list[str]], names: Names) -> int | None:
    """The only column in which every cell names an image."""
    found = []
    for position, name in enumerate(header):
        cells = [row[position].strip() for row in rows if position < len(row) and row[position].strip()]
        may_lack_suffix = name in KEY_COLUMNS | FILE_COLUMNS
        if cells and all(is_image_name(cell) or (may_lack_suffix and names.has(cell)) for cell in cells):
            found.append(position)
    return found[0] if len(found) == 1 else None


def _reader(text: str, delimiter: str) -> _csv.Reader:
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)


def _lines(table: str, body: str, first: int, layout: Layout, names: Names) -> Iterator[Line]:
    rows = _reader(body, layout.delimiter)
    before = first
    try:
        for number, row in enumerate(rows):
            begins, before = before + 1, first + rows.line_num
            _require_whole(table, row, begins, layout, names)
            if any(row) and not (layout.has_header and number == 0):
                cells = [cell.strip() for cell in row] + [""] * layout.width
                texts = tuple(cells[position] for position in layout.captions if cells[position])
                yield Line(begins, cells[layout.file], texts)
    except csv.Error as error:
        raise StageError(
            f"{table} is not a readable table ({error}, line {before + 1}; is a quote not closed?); repair it"
        ) from None


def _require_whole(table: str, row: list[str], line: int, layout: Layout, names: Names) -> None:
    """Raise `StageError` if a row contains further rows (an unclosed quote) or has too many cells."""
    for cell in row:
        for inner in re.split("[\r\n]+", cell)[1:] if "\n" in cell or "\r" in cell else ():
            cells = inner.split(layout.delimiter)
            name = cells[layout.file].strip(' "') if layout.file < len(cells) > 1 else ""
            if is_image_name(name) or (name and len(cells) >= layout.width and names.has(name)):
                raise StageError(
                    f"{table}: a quote in line {line} is not closed before the line of {name}; close it, or double a "
                    "quote that belongs to a caption"
                )
    if any(cell.strip() for cell in row[layout.width :]):
        raise StageError(
            f"{table}: line {line} has {len(row)} cells, but the first line has {layout.width}; quote captions "
            f"that contain '{layout.delimiter}'"
        )
