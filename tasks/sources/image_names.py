"""Which image a name in a table means."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable

from tasks.pictures import decoding
from tasks.runtime.stage import StageError
from tasks.sources.text_files import composed

_TURN = re.compile(r"#\d+$")
"""The number of a caption behind the name of its image, as in "12.jpg#0" of Flickr8k."""


def is_image_name(name: str) -> bool:
    """Whether a name ends like that of an image."""
    return posixpath.splitext(_plain(name))[1].lower() in decoding.SUFFIXES


def _plain(name: str) -> str:
    return _TURN.sub("", name.strip().replace("\\", "/"))


class Names:
    """The paths of all images, to be found by what tables call them. Names are compared in Unicode's form NFC."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = list(paths)
        self._whole = {composed(path): path for path in self.paths}
        self._last: dict[str, list[str]] = {}
        """Composed paths by their last part, with and without its suffix."""
        for path in self._whole:
            last = posixpath.basename(path)
            for key in (last, posixpath.splitext(last)[0]):
                self._last.setdefault(key, []).append(path)

    def find(self, name: str, table: str) -> str | None:
        """The image that `table` calls `name`: a path from the folder of the table or from the top, or the path
        or the bare name, with or without suffix, on the machine where the table was written.

        Raises `StageError` where several images fit.
        """
        wanted = composed(_plain(name))
        for path in (posixpath.join(posixpath.dirname(table), wanted), wanted):
            if path and (found := self._whole.get(posixpath.normpath(path))):
                return found
        last = posixpath.basename(wanted)
        same = self._last.get(last, [])
        same = [path for path in same if posixpath.basename(path) == last] or same
        same = _alike(wanted, same) if len(same) > 1 else same
        if len(same) > 1:
            raise StageError(
                f"{table} says '{name}', which may be {same[0]} or {same[1]}; write the path of the image from the "
                "table"
            )
        return self._whole[same[0]] if same else None

    def knows(self, name: str) -> bool:
        """Whether some image has this name, with or without its suffix."""
        return posixpath.basename(composed(_plain(name))) in self._last


def _alike(wanted: str, paths: list[str]) -> list[str]:
    """Those of several paths that share the most parts with `wanted`, counted from the end."""
    shared = [_shared_parts(wanted, path) for path in paths]
    return [path for path, count in zip(paths, shared, strict=True) if count == max(shared)]


def _shared_parts(one: str, other: str) -> int:
    """Equal folders at the end of two paths."""
    count = 0
    for a, b in zip(reversed(one.split("/")[:-1]), reversed(other.split("/")[:-1]), strict=False):
        if a != b:
            break
        count += 1
    return count
