"""Untrusted image bytes -> pixels: what may be opened, how a picture becomes a square array, how two are compared.

Pillow is only ever asked for the formats and modes listed here, and for at most `max_pixels` pixels.
"""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
    # Not readable here, but images all the same: they go to quarantine instead of being overlooked.
    | {".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".svg", ".exr", ".raw", ".dng"}
)
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B")
HASH_SIDE = 32
EXIF_ORIENTATION, QUARTER_TURNS = 0x0112, (5, 6, 7, 8)
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""What sets a picture upright, by its orientation (EXIF 2.32, section 4.6.4)."""


class UnreadableError(Exception):
    """Bytes that are not one still picture we can read. `reason` is one of a few words, `detail` is free text."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def open_image(data: bytes, max_pixels: int) -> Image:
    """Encoded bytes -> a fully decoded picture with at most `max_pixels` pixels, in one of `MODES`.

    Raises `UnreadableError` with reason "zero bytes", "not an image", "too many pixels", "animated",
    "unsupported mode" or "truncated".
    """
    import PIL.Image

    if not data:
        raise UnreadableError("zero bytes", "the file is empty")
    # Pillow's own limit only warns up to twice its size. Opening reads no pixels, so ours, below, comes in time.
    PIL.Image.MAX_IMAGE_PIXELS = None
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    except PIL.UnidentifiedImageError:
        raise UnreadableError("not an image", "the bytes are in none of the formats read here") from None
    except Exception as error:  # a damaged header raises whatever its parser stumbles over
        raise UnreadableError("not an image", f"{type(error).__name__}: {error}") from None
    if image.width * image.height > max_pixels:
        raise UnreadableError("too many pixels", f"{image.width}x{image.height} is over the limit of {max_pixels}")
    try:
        frames = getattr(image, "n_frames", 1)
        # MPO is a JPEG photograph followed by a depth map or a second view: its first frame is the picture.
        if frames > 1 and image.format != "MPO":
            raise UnreadableError("animated", f"{frames} frames or pages")
        if image.mode not in MODES:
            raise UnreadableError("unsupported mode", f"pixels of mode {image.mode}")
        image.load()
    except UnreadableError:
        raise
    except Exception as error:
        raise UnreadableError("truncated", f"{type(error).__name__}: {error}") from None
    return image


def to_mode(image: Image, channels: int) -> Image:
    """A decoded picture -> mode "L" (1 channel) or "RGB" (3): upright, 16 bits scaled to 8, transparency on white."""
    import PIL.Image

    mode = {1: "L", 3: "RGB"}[channels]
    turn = TURNS.get(_orientation(image))
    if turn:
        image = image.transpose(PIL.Image.Transpose[turn])
    if image.mode.startswith("I;16"):
        import numpy as np

        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == mode else image.convert(mode)


def upright_size(image: Image) -> tuple[int, int]:
    """Height and width of a decoded picture as it is looked at, which may be turned against how it is stored."""
    turned = _orientation(image) in QUARTER_TURNS
    return (image.width, image.height) if turned else (image.height, image.width)


def _orientation(image: Image) -> Any:
    """How a picture is to be turned, a key of `TURNS`; where its EXIF data is damaged it is as it is stored."""
    try:
        return image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # whatever the parser stumbles over; viewers show such a picture too
        return None


def ingested(data: bytes, pixels: int, form: tuple[int, int], channels: int) -> np.ndarray:
    """A picture that `ingest` let through, which has so many `pixels` -> uint8 [channels, *form], see `to_form`.

    It was opened under `ingest.max_pixels`, so it is read whatever its size.
    """
    return to_form(open_image(data, max_pixels=pixels), form, channels)


def to_form(image: Image, form: tuple[int, int], channels: int) -> np.ndarray:
    """A decoded picture -> uint8 [channels, height, width]: as much of its middle as has the shape of `form` (height,
    width), resized with antialiased bilinear."""
    import numpy as np
    import PIL.Image

    image = to_mode(image, channels)
    height, width = form
    across = min(image.width, max(1, round(image.height * width / height)))
    down = min(image.height, max(1, round(image.width * height / width)))
    left, top = (image.width - across) // 2, (image.height - down) // 2
    if image.size != (width, height):
        box = (left, top, left + across, top + down)
        image = image.resize((width, height), PIL.Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def thumbnail(image: Image) -> np.ndarray:
    """A decoded picture -> uint8 [32, 32], grey, aspect ratio ignored: what `perceptual_hashes` compares."""
    import numpy as np
    import PIL.Image

    if image.has_transparency_data and image.size != (HASH_SIDE, HASH_SIDE):
        # Small before it is laid on white, which takes three times the memory of the picture.
        whole = image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
        image = whole.resize((HASH_SIDE, HASH_SIDE), PIL.Image.Resampling.BILINEAR)
    grey = to_mode(image, 1)
    if grey.size != (HASH_SIDE, HASH_SIDE):
        grey = grey.resize((HASH_SIDE, HASH_SIDE), PIL.Image.Resampling.BILINEAR)
    return np.asarray(grey)


def perceptual_hashes(thumbnails: np.ndarray) -> list[str]:
    """uint8 [n, 32, 32] -> n hashes of 16 hexadecimal digits; similar pictures differ in few bits.

    The pHash of Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010):
    the signs, about their median, of the 8x8 lowest DCT-II frequencies. The numbers are whole and
    stay below 2^53, so float64 is exact and the same picture has the same hash on every machine.
    """
    import numpy as np

    basis = _integer_cosines()
    low = basis @ (thumbnails.astype(np.float64) @ basis.T)
    coefficients = low.reshape(len(thumbnails), 64)
    bits = coefficients > np.median(coefficients, axis=1, keepdims=True)
    return [row.tobytes().hex() for row in np.packbits(bits, axis=1)]


@functools.cache
def _integer_cosines() -> np.ndarray:
    """float64 [8, 32]: the 8 lowest DCT-II basis functions over 32 samples, scaled by 4096 and rounded."""
    import numpy as np

    frequency, sample = np.arange(8)[:, None], np.arange(HASH_SIDE)[None]
    return np.rint(4096 * np.cos(np.pi * frequency * (2 * sample + 1) / (2 * HASH_SIDE)))
