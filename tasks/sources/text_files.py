"""Bytes of text files from outside -> text, lines and JSON, with the same result on every version of Python."""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from typing import Any

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
MAX_DEPTH = 64
"""Deepest nesting of a JSON document. Python's parser gives up at a depth that depends on its version."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_LINE_END = re.compile("\r\n|\n|\r")


def decoded(content: bytes) -> str:
    """Bytes -> text: UTF-8, or what a byte order mark says. Bytes that cannot be decoded become lone surrogates,
    which `is_damaged` finds."""
    for mark, encoding in BYTE_ORDER_MARKS:
        if content.startswith(mark):
            try:
                return content[len(mark) :].decode(encoding)
            except UnicodeDecodeError:
                break
    return content.decode("utf-8-sig", "surrogateescape")


def is_damaged(text: str) -> bool:
    """Whether some bytes of a text could not be decoded."""
    return _SURROGATE.search(text) is not None


def lines(text: str) -> list[str]:
    """Stripped lines that are not empty. A line ends with LF, CR or both; `str.splitlines` would also split at
    vertical tabs, U+0085, U+2028 and others, which people paste into captions."""
    return [line.strip() for line in _LINE_END.split(text) if line.strip()]


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC), in which names are compared: macOS writes them decomposed (NFD)."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def parsed(text: str | bytes) -> Any:
    """A JSON document. Raises `ValueError` with the reason where it is damaged or nested deeper than `MAX_DEPTH`."""
    try:
        document = json.loads(text)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    level = [document]
    for _ in range(MAX_DEPTH):
        level = [value for holder in level for value in _inside(holder) if isinstance(value, (dict, list))]
        if not level:
            return document
    raise ValueError(_too_deep())


def _too_deep() -> str:
    return f"JSON nested deeper than {MAX_DEPTH} levels"


def _inside(holder: Any) -> Any:
    return holder.values() if isinstance(holder, dict) else holder if isinstance(holder, list) else ()
