"""Find the image that a name in a caption file refers to."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable

from tasks.runtime.errors import StageError
from tasks.sources import suffixes
from tasks.sources.text_files import composed

_CAPTION_NUMBER = re.compile(r"#\d+$")
"""Number of a caption after the name of its image, as in "12.jpg#0" of Flickr8k."""


def is_image_name(name: str) -> bool:
    """Whether a name has the suffix of an image."""
    return posixpath.splitext(_plain(name))[1].lower() in suffixes.SUFFIXES


def _plain(name: str) -> str:
    return _CAPTION_NUMBER.sub("", name.strip().replace("\\", "/"))


class Names:
    """Paths of all images, searchable by the names in caption files. Names are compared in Unicode form NFC."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = list(paths)
        self._whole: dict[str, list[str]] = {}
        """Paths by their form NFC; more than one if they differ only in their Unicode form."""
        for path in self.paths:
            self._whole.setdefault(composed(path), []).append(path)
        self._last: dict[str, list[str]] = {}
        """Paths in form NFC by file name, with and without suffix."""
        for path in self._whole:
            last = posixpath.basename(path)
            for key in (last, posixpath.splitext(last)[0]):
                self._last.setdefault(key, []).append(path)

    def find(self, name: str, table: str) -> str | None:
        """The image that `table` calls `name`; None if there is none.

        `name` may be a path relative to the folder of the table or to the root of the dataset, a path on another
        machine, or a file name with or without suffix. Raises `StageError` if several images match.
        """
        wanted = composed(_plain(name))
        for path in (posixpath.join(posixpath.dirname(table), wanted), wanted):
            if path and (found := self._whole.get(posixpath.normpath(path))):
                return _in_the_form_of(name, found, table)
        last = posixpath.basename(wanted)
        matches = self._last.get(last, [])
        matches = [path for path in matches if posixpath.basename(path) == last] or matches
        matches = _most_similar(wanted, matches) if len(matches) > 1 else matches
        if len(matches) > 1:
            raise StageError(
                f"'{name}' in {table} matches {matches[0]} and {matches[1]}; write the path of the image relative to "
                "the table"
            )
        return _in_the_form_of(name, self._whole[matches[0]], table) if matches else None

    def has(self, name: str) -> bool:
        """Whether an image has this name, with or without suffix."""
        return posixpath.basename(composed(_plain(name))) in self._last


def _in_the_form_of(name: str, paths: list[str], table: str) -> str:
    """The one of `paths`, which are equal in form NFC, that ends in `name` as it is written."""
    exact = paths if len(paths) == 1 else [path for path in paths if path.endswith(_plain(name))]
    if len(exact) != 1:
        raise StageError(
            f"'{name}' in {table} matches {len(paths)} images whose names differ only in their Unicode form (NFC, "
            "NFD); rename one of them"
        )
    return exact[0]


def _most_similar(wanted: str, paths: list[str]) -> list[str]:
    """The paths that share the most parent folders with `wanted`, counted from the end."""
    shared = [_shared_parts(wanted, path) for path in paths]
    return [path for path, count in zip(paths, shared, strict=True) if count == max(shared)]


def _shared_parts(one: str, other: str) -> int:
    """Number of equal parent folders at the end of two paths."""
    count = 0
    for a, b in zip(reversed(one.split("/")[:-1]), reversed(other.split("/")[:-1]), strict=False):
        if a != b:
            break
        count += 1
    return count
