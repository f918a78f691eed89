"""The image and mask files of the command: read, compared with those of an earlier drawing, and brought to size."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from models.masks import rectangle
from models.networks.control_maps import CHANNELS as RGB
from models.networks.control_maps import maps_of
from tasks.drawing import given
from tasks.drawing.settings import File, Rectangle
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    import numpy as np

    from models.pipeline import PipelineInfo
    from tasks.drawing.settings import Settings


def described(path: Path, option: str) -> File:
    """Return a file's place and SHA-256.

    Raises:
        StageError: if it cannot be read, or is too large.
    """
    return File(path=str(path), sha256=hashlib.sha256(_bytes(path, option)).hexdigest())


def unchanged(file: File | None, option: str, like: Path) -> File | None:
    """Return the file of an earlier drawing.

    Raises:
        StageError: if it is missing or has another content.
    """
    if file is not None and described(Path(file.path), option) != file:
        raise StageError(f"{file.path} is not the file that {like} was drawn from; give {option}")
    return file


def load(settings: Settings, info: PipelineInfo) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the image, uint8 [C, S, S], and the mask, bool [S, S], of the settings; None for what they lack.

    Raises:
        StageError: for files that are not images, a mask without an image, or an impossible rectangle.
    """
    if settings.image is None:
        if settings.mask is not None or settings.mask_rectangle is not None:
            raise StageError("a mask changes an image; give --image, or leave the mask out")
        return None, None
    mask = None if settings.mask is None else _bytes(Path(settings.mask.path), "--mask")
    try:
        found = given.read(_bytes(Path(settings.image.path), "--image"), mask, info.channels, info.size)
    except ValueError as error:
        raise StageError(str(error)) from None
    if found.original != (info.size, info.size):
        width, height = found.original
        print(f"draw: {settings.image.path} was brought from {width} x {height} to {info.size} x {info.size} pixels")
    if settings.mask_rectangle is not None:
        return found.image, _rectangle(settings.mask_rectangle, info.size)
    return found.image, found.mask


def load_control(settings: Settings, info: PipelineInfo) -> np.ndarray | None:
    """Return the control map of the settings, uint8 [1 or 3, h, w]; None without one.

    Raises:
        StageError: for files that are not images, or a map to be made for a model that does not say how.
    """
    file = settings.control or settings.control_from
    if file is None:
        return None
    option = "--control" if settings.control else "--control-from"
    spec, data = info.control_spec, _bytes(Path(file.path), option)
    try:
        if settings.control is None:
            if spec is None:
                raise StageError("--control-from needs a model whose ControlNet was trained here; give --control")
            return maps_of(spec, given.read(data, None, info.channels, info.size).image[None])[0]
        coarse = spec.colour_cells if spec and spec.kind == "colour" else info.size
        width, height = given.dimensions(data, "control map")
        side = coarse if (width, height) == (coarse, coarse) else info.size
        if (width, height) != (side, side):
            print(f"draw: {file.path} was brought from {width} x {height} to {side} x {side} pixels")
        return given.read(data, None, 1 if spec and spec.channels == 1 else RGB, side).image
    except ValueError as error:
        raise StageError(str(error)) from None


def parse_rectangle(text: str) -> Rectangle:
    """Parse LEFT,TOP,WIDTH,HEIGHT in pixels of the drawn image.

    Raises:
        StageError: for anything else.
    """
    try:
        left, top, width, height = map(int, text.split(","))
    except ValueError:
        raise StageError(f"--mask-rectangle {text} must be four integers, LEFT,TOP,WIDTH,HEIGHT") from None
    return left, top, width, height


def _rectangle(chosen: Rectangle, side: int) -> np.ndarray:
    left, top, width, height = chosen
    try:
        return rectangle(side, side, left, top, left + width, top + height)
    except ValueError:
        named = ",".join(map(str, chosen))
        raise StageError(
            f"--mask-rectangle {named} (LEFT,TOP,WIDTH,HEIGHT) is empty or leaves the image of {side} x {side} pixels"
        ) from None


def _bytes(path: Path, option: str) -> bytes:
    try:
        if path.stat().st_size > given.MAX_BYTES:
            raise StageError(f"{option} {path} is larger than {given.MAX_BYTES >> 20} MiB; give a smaller file")
        return path.read_bytes()
    except OSError as error:
        raise StageError(
            f"{option} {path} cannot be read ({os.strerror(error.errno or 0)}); name an image file"
        ) from None
