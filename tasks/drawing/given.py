"""Images and masks that a user gives: bytes of any supported format -> arrays of the model's size.

They pass through the decoder of `ingest`, with its limits and colour profiles. The ONNX bundle contains a copy of this
file and of those that it imports, so it needs only NumPy, Pillow and the standard library.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.pictures import decoding

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

MAX_BYTES, MAX_PIXELS = 64 << 20, 64 << 20
"""Largest file, and most pixels of an image."""
LIGHT = 128
"""Grey values from this one on are painted anew."""


@dataclass(frozen=True)
class Given:
    """An image, and a mask of it."""

    image: np.ndarray
    """uint8 [C, S, S]."""
    mask: np.ndarray | None
    """bool [S, S], true where the image is painted anew."""
    original: tuple[int, int]
    """Width and height of the image's file."""


def read(image: bytes, mask: bytes | None, channels: int, side: int) -> Given:
    """Decode an image, and its mask if there is one, and bring both to `side` x `side` pixels.

    They are cropped around the centre to a square and resized. The light half of a mask's grey values is true;
    transparency counts as white.

    Raises:
        ValueError: if one of them is not a still image within the limits, or if the mask has another size than the
            image.
    """
    opened = _open(image, "image")
    width, height = decoding.upright_size(opened)[::-1]
    pixels = decoding.crop_and_resize(opened, (side, side), channels)
    if mask is None:
        return Given(pixels, None, (width, height))
    drawn = _open(mask, "mask")
    found = decoding.upright_size(drawn)[::-1]
    if found not in ((width, height), (side, side)):
        raise ValueError(
            f"the mask is {found[0]} x {found[1]} pixels and the image {width} x {height}; give a mask of the same size"
        )
    return Given(pixels, decoding.crop_and_resize(drawn, (side, side), 1)[0] >= LIGHT, (width, height))


def dimensions(data: bytes, name: str) -> tuple[int, int]:
    """Return width and height of an image.

    Raises:
        ValueError: if it is not a still image within the limits.
    """
    height, width = decoding.upright_size(_open(data, name))
    return width, height


def _open(data: bytes, name: str) -> Image:
    if len(data) > MAX_BYTES:
        raise ValueError(f"the {name} has {len(data)} bytes, over the limit of {MAX_BYTES}; make it smaller")
    try:
        return decoding.open_image(data, MAX_PIXELS)
    except decoding.UnreadableError as error:
        raise ValueError(f"the {name} cannot be read ({error}); give a PNG or JPEG file") from None


def from_base64(text: str, name: str) -> bytes:
    """Decode base64, with or without the head of a data URI (`data:image/png;base64,`).

    Raises:
        ValueError: if it is not base64, or too long.
    """
    if text.startswith("data:"):
        text = text.partition(",")[2]
    if len(text) > MAX_BYTES // 3 * 4 + 4:
        raise ValueError(f"the {name} is longer than {MAX_BYTES} bytes; make it smaller")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"the {name} is not base64; encode the bytes of a PNG or JPEG file") from None
