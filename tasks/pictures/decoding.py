"""Untrusted image bytes -> pixels: accepted formats, decoding limits, crop and resize, perceptual hashes.

Pillow opens only the formats and modes listed here, and at most `max_pixels` pixels. Images with a colour profile
other than sRGB are converted to sRGB (`tasks.pictures.colours`).
"""

from __future__ import annotations

import functools
import io
import re
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import PIL.PngImagePlugin

from tasks.pictures import colours

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
HEAD_BYTES = 64
"""Bytes at the start of a file that identify the kind of image."""
KINDS = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF....WEBP",
    "GIF": rb"GIF8[79]a",
    "TIFF": rb"II\*\0|MM\0\*",
    "BMP": rb"BM....\0\0\0\0....[\x0c\x28\x38\x6c\x7c]\0\0\0",
    "PPM": rb"P[1-6]\s",
    "HEIF": rb"....ftyp(?:heic|heix|heim|heis|hevc|hevx|mif1|msf1)",
    "AVIF": rb"....ftypavi[fs]",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n",
    "JPEG 2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    "Photoshop": rb"8BPS\0[\x01\x02]",
    "OpenEXR": rb"\x76\x2f\x31\x01",
    "DDS": rb"DDS \x7c\0\0\0",
    "QOI": rb"qoif",
    "ICO": rb"\0\0[\x01\x02]\0[^\0]\0....[\x01\0]\0",
    "GIMP": rb"gimp xcf ",
    "Radiance HDR": rb"#\?(?:RADIANCE|RGBE)",
    "SVG": rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?<svg[\s>]",
    "PostScript": rb"%!PS-Adobe-[\d.]+ EPSF|\xc5\xd0\xd3\xc6",
    "Targa": rb".(?:\0[\x02\x03\x0a\x0b]\0{5}|\x01[\x01\x09]....[\x0f\x10\x18\x20]).{8}[\x08\x0f\x10\x18\x20][\0-\x3f]",
}
"""Kind of image -> pattern of the first bytes; kinds that are not in `FORMATS` are recognised but not read."""
_KINDS = {kind: re.compile(pattern, re.DOTALL) for kind, pattern in KINDS.items()}
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
CONVERT = "convert them to PNG or JPEG"
MAX_MAP_PIXELS = 100_000_000
"""Pixels of a control map that the user gives, at most."""
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
"""EXIF orientation -> Pillow's transposition that turns the image upright (EXIF 2.32, section 4.6.4)."""


class UnreadableError(Exception):
    """The bytes are not a still image in a supported format. `reason` is one of a few phrases, `detail` free text."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def open_image(data: bytes, max_pixels: int) -> Image:
    """Encoded bytes -> a fully decoded image with at most `max_pixels` pixels, in one of `MODES`.

    Text chunks of a PNG file that exceed Pillow's limits are skipped. Raises `UnreadableError` with reason "zero
    bytes", "not an image", "KIND is not read", "too many pixels", "animated", "unsupported mode" or "truncated".
    """
    if not data:
        raise UnreadableError("zero bytes", "the file is empty")
    try:
        return _opened(data, max_pixels)
    except UnreadableError as error:
        bare = _without_texts(data) if error.reason in ("not an image", "truncated") else data
        if len(bare) == len(data):
            raise
        return _opened(bare, max_pixels)


def _opened(data: bytes, max_pixels: int) -> Image:
    # Pillow only warns up to twice its own limit. Opening decodes no pixels, so the check below comes early enough.
    PIL.Image.MAX_IMAGE_PIXELS = None
    PIL.PngImagePlugin.MAX_TEXT_CHUNK = colours.MAX_BYTES  # applies to texts and to colour profiles
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    except PIL.UnidentifiedImageError:
        kind = kind_of(data[:HEAD_BYTES])
        if kind is not None and kind not in FORMATS:
            raise UnreadableError(f"{kind} is not read", f"{kind} images are not supported; {CONVERT}") from None
        raise UnreadableError("not an image", "the bytes are in none of the supported formats") from None
    except Exception as error:  # damaged headers raise many types of errors
        raise UnreadableError("not an image", f"{type(error).__name__}: {error}") from None
    if image.width * image.height > max_pixels:
        raise UnreadableError("too many pixels", f"{image.width}x{image.height} is over the limit of {max_pixels}")
    try:
        frames = getattr(image, "n_frames", 1)
        # MPO is a JPEG photograph followed by a depth map or a second view; the first frame is the photograph.
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


def kind_of(head: bytes) -> str | None:
    """The first `HEAD_BYTES` of a file -> the kind of image, a key of `KINDS`; None for other files."""
    return next((kind for kind, pattern in _KINDS.items() if pattern.match(head)), None)


def _without_texts(data: bytes) -> bytes:
    """Remove the text chunks of a PNG file; a no-op for other files."""
    if not data.startswith(PNG_MAGIC):
        return data
    kept, place = [PNG_MAGIC], len(PNG_MAGIC)
    while place + 8 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] not in (b"tEXt", b"zTXt", b"iTXt"):
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def to_mode(image: Image, channels: int) -> Image:
    """Convert a decoded image to mode "L" (1 channel) or "RGB" (3 channels) in sRGB.

    The image is turned upright, scaled from 16 to 8 bits, and transparency is composited on white.
    """
    return _flat(colours.to_srgb(_upright(image)), channels)


def _upright(image: Image) -> Image:
    turn = TURNS.get(_orientation(image))
    return image.transpose(PIL.Image.Transpose[turn]) if turn else image


def _flat(image: Image, channels: int) -> Image:
    mode = {1: "L", 3: "RGB"}[channels]
    image = colours.eight_bits(image)
    if image.has_transparency_data:
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == mode else image.convert(mode)


def upright_size(image: Image) -> tuple[int, int]:
    """Height and width of a decoded image after it is turned upright."""
    turned = _orientation(image) in QUARTER_TURNS
    return (image.width, image.height) if turned else (image.height, image.width)


def _orientation(image: Image) -> int:
    """EXIF orientation of an image; 1 (as stored) if it is missing or the EXIF data is damaged."""
    try:
        value = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # damaged EXIF data raises many types of errors; viewers show such an image as stored
        return 1
    return value if isinstance(value, int) else 1


def decode_resized(data: bytes, pixels: int, resolution: tuple[int, int], channels: int) -> np.ndarray:
    """Decode an image of the dataset -> uint8 [channels, *resolution], see `crop_and_resize`.

    `pixels` is width * height from the metadata; `ingest` has already enforced `ingest.max_pixels`.
    """
    return crop_and_resize(open_image(data, max_pixels=pixels), resolution, channels)


def crop_and_resize(image: Image, resolution: tuple[int, int], channels: int) -> np.ndarray:
    """A decoded image -> uint8 [channels, height, width] in sRGB, for `resolution` = (height, width).

    The image is cropped around its centre to the aspect ratio of `resolution`, then resized (bilinear, antialiased).
    """
    image = to_mode(image, channels)
    height, width = resolution
    across = min(image.width, max(1, round(image.height * width / height)))
    down = min(image.height, max(1, round(image.width * height / width)))
    left, top = (image.width - across) // 2, (image.height - down) // 2
    if image.size != (width, height):
        box = (left, top, left + across, top + down)
        image = image.resize((width, height), PIL.Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def thumbnail(image: Image) -> np.ndarray:
    """A decoded image -> uint8 [32, 32], the input of `perceptual_hashes`.

    The image is converted to grey and squeezed to a square; its colour profile is ignored.
    """
    if image.has_transparency_data and image.size != (HASH_SIDE, HASH_SIDE):
        # Resized before compositing on white, which needs three times the memory of the image.
        whole = image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
        image = whole.resize((HASH_SIDE, HASH_SIDE), PIL.Image.Resampling.BILINEAR)
    grey = _flat(_upright(image), 1)
    if grey.size != (HASH_SIDE, HASH_SIDE):
        grey = grey.resize((HASH_SIDE, HASH_SIDE), PIL.Image.Resampling.BILINEAR)
    return np.asarray(grey)


def perceptual_hashes(thumbnails: np.ndarray) -> list[str]:
    """uint8 [n, 32, 32] -> n hashes of 16 hexadecimal digits; similar images differ in few bits.

    The pHash of Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010): one bit for each
    of the 8x8 lowest DCT-II frequencies, set if the coefficient is above the median. All values are integers below
    2^53, so float64 is exact and an image has the same hash on every machine.
    """
    basis = _integer_cosines()
    low = basis @ (thumbnails.astype(np.float64) @ basis.T)
    coefficients = low.reshape(len(thumbnails), 64)
    bits = coefficients > np.median(coefficients, axis=1, keepdims=True)
    return [row.tobytes().hex() for row in np.packbits(bits, axis=1)]


@functools.cache
def _integer_cosines() -> np.ndarray:
    """float64 [8, 32]: the 8 lowest DCT-II basis functions over 32 samples, scaled by 4096 and rounded."""
    frequency, sample = np.arange(8)[:, None], np.arange(HASH_SIDE)[None]
    return np.rint(4096 * np.cos(np.pi * frequency * (2 * sample + 1) / (2 * HASH_SIDE)))
