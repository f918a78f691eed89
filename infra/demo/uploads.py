"""Uploaded images and painted masks: kept as files that `python -m tasks.draw` reads.

gradio's own decoding is not used: it opens every format of Pillow and has no limit on pixels.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import PIL.Image
from pydantic import BaseModel

from tasks.drawing import given
from tasks.pictures import decoding
from tasks.runtime import atomic, workspace
from tasks.runtime.errors import StageError

CANVAS_SIDE = 512
"""Least height and width of the canvas on which a mask is painted, pixels."""
PAINTED = 64
"""Alpha values from this one on are painted; the brush has about 150."""


class Upload(BaseModel):
    """A file that gradio has received, and that lies in its own folder."""

    path: str | None = None
    orig_name: str | None = None


def read(value: object, what: str) -> bytes:
    """Return the bytes of an uploaded file, the value of an image component.

    Raises:
        StageError: if there is none, or if it is too large.
    """
    if value is None:
        raise StageError(f"choose {what} first")
    path = Upload.model_validate(value).path
    if path is None or not Path(path).is_file():
        raise StageError(f"the file of {what} is not on the server any more; choose it again")
    if Path(path).stat().st_size > given.MAX_BYTES:
        raise StageError(f"{what} is larger than {given.MAX_BYTES >> 20} MiB; choose a smaller file")
    return Path(path).read_bytes()


def keep(data: bytes) -> Path:
    """Keep a file under a name made from its content, so that `--like` finds it again; returns its place."""
    kind = decoding.kind_of(data[: decoding.HEAD_BYTES]) or "image"
    file = workspace.scratch() / "demo" / f"{hashlib.sha256(data).hexdigest()[:16]}.{kind.lower()}"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(file, data)
    root = workspace.root()
    return file.relative_to(root) if file.is_relative_to(root) else file


def canvas(image: bytes, channels: int, side: int) -> PIL.Image.Image:
    """Return an image as the model sees it, cropped and resized to `side`, with pixels enlarged to `CANVAS_SIDE`.

    Raises:
        StageError: if it is not an image within the limits.
    """
    try:
        pixels = given.read(image, None, channels, side).image
    except ValueError as error:
        raise StageError(str(error)) from None
    factor = max(1, CANVAS_SIDE // side)
    shown = PIL.Image.fromarray(pixels[0] if channels == 1 else pixels.transpose(1, 2, 0))
    return shown.resize((side * factor, side * factor), PIL.Image.Resampling.NEAREST)


def mask(layers: list[bytes], side: int) -> bytes:
    """Return the mask painted on a canvas as a PNG of `side` x `side` pixels, white where most of a pixel is painted.

    Raises:
        StageError: if nothing is painted, or if a layer is not an image within the limits.
    """
    painted = np.zeros((side, side), bool)
    for layer in layers:
        try:
            alpha = decoding.open_image(layer, given.MAX_PIXELS).convert("RGBA").getchannel("A")
        except decoding.UnreadableError as error:
            raise StageError(f"the painted mask cannot be read ({error}); clear it and paint again") from None
        covered = alpha.point(lambda value: 255 if value >= PAINTED else 0)
        painted |= np.asarray(covered.resize((side, side), PIL.Image.Resampling.BOX)) >= given.LIGHT
    if not painted.any():
        raise StageError("paint over the part of the image that is to be drawn anew")
    buffer = io.BytesIO()
    PIL.Image.fromarray(painted).save(buffer, "PNG")
    return buffer.getvalue()
