"""Bytes of untrusted text files -> text, lines and JSON, with the same result on every version of Python."""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from collections.abc import Iterable
from typing import TypeAlias

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
MAX_DEPTH = 64
"""Largest accepted nesting of a JSON document. The limit of Python's own parser depends on its version."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_LINE_END = re.compile("\r\n|\n|\r")


def decoded(content: bytes) -> str:
    """Decode UTF-8, or the encoding of the byte order mark. Invalid bytes become lone surrogates, see `is_damaged`."""
    for mark, encoding in BYTE_ORDER_MARKS:
        if content.startswith(mark):
            try:
                return content[len(mark) :].decode(encoding)
            except UnicodeDecodeError:
                break
    return content.decode("utf-8-sig", "surrogateescape")


def is_damaged(text: str) -> bool:
    """Whether `decoded` met invalid bytes."""
    return _SURROGATE.search(text) is not None


def lines(text: str) -> list[str]:
    """Stripped lines that are not empty.

    A line ends with LF, CR or both. `str.splitlines` would also split at vertical tabs, U+0085 and U+2028, which occur
    within captions.
    """
    return [line.strip() for line in _LINE_END.split(text) if line.strip()]


def composed(name: str) -> str:
    """Convert a file name to Unicode form NFC, because macOS writes names in form NFD."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def parsed(text: str | bytes) -> Json:
    """Parse a JSON document. Raises `ValueError` if it is damaged or nested deeper than `MAX_DEPTH`."""
    try:
        document: Json = json.loads(text)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    level = [document]
    for _ in range(MAX_DEPTH):
        level = [value for container in level for value in _items(container) if isinstance(value, (dict, list))]
        if not level:
            return document
    raise ValueError(_too_deep())


def _too_deep() -> str:
    return f"JSON nested deeper than {MAX_DEPTH} levels"


def _items(container: Json) -> Iterable[Json]:
    return container.values() if isinstance(container, dict) else container if isinstance(container, list) else ()
