"""Bad inputs of many kinds, each with the expected result: an image of the dataset, or a quarantine reason."""

import io
import zlib

import numpy as np
import PIL.Image

from tests.support.data_inputs import picture

LOADS = "loads"
MAX_IMAGE_BYTES = 30_000


def bomb(width, height):
    """A PNG of a few hundred bytes whose header states `width` x `height` pixels."""

    def chunk(kind, data):
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def animation(kind):
    frames = [PIL.Image.open(io.BytesIO(picture(seed))) for seed in range(3)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned():
    """A JPEG that is red above blue after the rotation in its EXIF data."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    image = PIL.Image.new("RGB", (20, 10), "blue")
    image.paste((255, 0, 0), (0, 0, 10, 10))
    return saved(image, "JPEG", exif=exif, quality=100)


def with_exif(tiff):
    """A JPEG whose EXIF data is `tiff`."""
    plain, body = saved(PIL.Image.new("RGB", (8, 8), "red"), "JPEG", quality=100), b"Exif\0\0" + tiff
    return plain[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + plain[2:]


FILES = {
    "empty.png": (b"", "zero bytes"),
    "text.jpg": (b"This is no picture.", "not an image"),
    "page.png": (b"<html><body>404</body></html>", "not an image"),
    "header.png": (picture(1)[:20], "not an image"),
    "cut.jpg": (picture(1, (200, 200), "JPEG")[:-400], "truncated"),
    "cut.png": (picture(1, (64, 64))[:-60], "truncated"),
    "bomb.png": (bomb(50_000, 50_000), "too many pixels"),
    "large.png": (bomb(8_000, 8_000), "too many pixels"),
    "moving.gif": (animation("GIF"), "animated"),
    "moving.png": (animation("PNG"), "animated"),
    "moving.webp": (animation("WEBP"), "animated"),
    "pages.tif": (animation("TIFF"), "animated"),
    "float.tif": (saved(PIL.Image.new("F", (8, 8)), "TIFF"), "unsupported mode"),
    "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG is not read"),
    "drawing.jpg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG is not read"),
    "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "PostScript is not read"),
    "heavy.png": (b"x" * 40_000, "oversized"),
    "README.txt": (b"about", "no image file"),
    "one.png": (picture(2, (1, 1)), LOADS),
    "press.jpg": (saved(PIL.Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "JPEG", quality=100), LOADS),
    "deep.png": (saved(PIL.Image.fromarray(np.full((8, 8), 0x80FF, np.uint16)), "PNG"), LOADS),
    "turned.jpg": (turned(), LOADS),
    "wrong-exif.jpg": (with_exif(b"XX*\0\x08\0\0\0"), LOADS),
    "cut-exif.jpg": (with_exif(b"II*\0\x08\0\0\0\xff\xff"), LOADS),
    "clear.png": (saved(PIL.Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG"), LOADS),
    "palette.gif": (picture(3, (9, 9), "GIF", "P"), LOADS),
    "still.webp": (picture(4, (9, 9), "WEBP"), LOADS),
    "copy.png": (picture(0), LOADS),
    "again/copy.png": (picture(0), LOADS),
}
"""Name -> content, and the reason in quarantine or `LOADS`."""

COLOURS = {
    "press.jpg": (255, 0, 0),
    "deep.png": (0x80, 0x80, 0x80),
    "clear.png": (255, 255, 255),
    "wrong-exif.jpg": (255, 0, 0),
    "cut-exif.jpg": (255, 0, 0),
}
"""Name -> colour of each image of a single colour after conversion to RGB."""

CAPTIONS = {
    "long.png": ("a " * 5000, LOADS),
    "bell.png": ("a picture\a with a bell", "control characters in a caption"),
    "escape.png": ("\x1b[31mred\x1b[0m", "control characters in a caption"),
    "null.png": ("a pict\0ure", "control characters in a caption"),
    "latin1.png": (b"caf\xe9", "caption not UTF-8"),
    "nan.png": ("NaN", LOADS),
    "none.png": ("", LOADS),
    "emoji.png": ("a cat \U0001f408 in the caf\u00e9", LOADS),
}
"""Image -> its caption, and the reason in quarantine or `LOADS`."""


def caption_table():
    lines = [b"image,caption"]
    lines += [
        name.encode() + b"," + (text if isinstance(text, bytes) else text.encode())
        for name, (text, _) in CAPTIONS.items()
    ]
    return b"\n".join(lines) + b"\n"
