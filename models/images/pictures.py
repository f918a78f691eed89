"""Arrays to pictures: grids with titles, animations, and PNG files with reproducible bytes.

Pixels are enlarged by repetition, without interpolation, so that a picture shows what the model drew. Gaps and margins
are transparent and titles mid-grey, so that pictures are legible on light and dark pages.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TITLE_COLOUR = (118, 122, 130, 255)
"""Contrast about 4:1 against white and against near-black."""
TITLE_GAP = 6
LAST_FRAME_MS = 2400
EQUAL_DB = 200.0
"""PSNR in dB of equal images, and the largest value."""


def grid(
    images: np.ndarray,
    columns: int,
    scale: int = 4,
    row_titles: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
    padding: int = 2,
) -> Image.Image:
    """Arrange images in rows of `columns`; returns an RGBA image.

    Args:
        images: uint8 [N, C, H, W], C = 1 (grey) or 3 (RGB), N >= 1. Cells after the last image are transparent.
        columns: images per row.
        scale: each pixel becomes a square of `scale` x `scale`.
        row_titles: one for each of the ceil(N / columns) rows, on the left.
        column_titles: one for each column, above it; titles wider than the column are truncated and end in "..".
        padding: transparent pixels between neighbours.

    Raises:
        ValueError: for another dtype or shape, or a wrong number of titles.
    """
    tiles = _tiles(images, scale)
    count, height, width = tiles.shape[:3]
    rows = -(-count // columns)
    _check_titles("row_titles", row_titles, rows)
    _check_titles("column_titles", column_titles, columns)

    font = ImageFont.load_default(size=min(20, max(11, width // 5)))
    left = (
        max((math.ceil(font.getlength(title)) for title in row_titles), default=0) + 2 * TITLE_GAP if row_titles else 0
    )
    top = sum(font.getmetrics()) + TITLE_GAP if column_titles else 0  # type: ignore[union-attr]
    step_x, step_y = width + padding, height + padding
    canvas = Image.new("RGBA", (left + columns * step_x - padding, top + rows * step_y - padding))
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        canvas.paste(Image.fromarray(tile), (left + column * step_x, top + row * step_y))

    draw = ImageDraw.Draw(canvas)
    for row, title in enumerate(row_titles or ()):
        middle = top + row * step_y + height / 2
        draw.text((left - TITLE_GAP, middle), title, TITLE_COLOUR, font, anchor="rm")
    for column, title in enumerate(column_titles or ()):
        middle = left + column * step_x + width / 2
        draw.text((middle, top - TITLE_GAP), _truncated(title, width, font), TITLE_COLOUR, font, anchor="ms")
    return canvas


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG without metadata: the same pixels give the same bytes."""
    path.write_bytes(png_bytes(image))


def png_bytes(image: Image.Image) -> bytes:
    """Encode a PNG without metadata: the same pixels give the same bytes."""
    buffer = io.BytesIO()
    _bare(image).save(buffer, format="PNG")  # `optimize` makes grids 3% smaller, and takes 6 times as long
    return buffer.getvalue()


def tile_png(image: np.ndarray) -> bytes:
    """Encode one image, uint8 [C, H, W] with C = 1 or 3, as a PNG of its own size."""
    array = _tiles(image[None], 1)[0]
    return png_bytes(Image.fromarray(array[..., :3] if len(image) == 3 else array[..., 0]))


def shrunk(images: np.ndarray, largest: int) -> np.ndarray:
    """Halve height and width by averaging squares of four pixels until neither exceeds `largest`.

    uint8 [..., H, W] -> uint8 [..., H / 2^k, W / 2^k]; stops early at an odd height or width.
    """
    while max(images.shape[-2:]) > largest and not any(side % 2 for side in images.shape[-2:]):
        *others, height, width = images.shape
        blocks = images.reshape(*others, height // 2, 2, width // 2, 2)
        images = np.round(blocks.mean(axis=(-3, -1))).astype(np.uint8)
    return images


def save_animation(frames: Sequence[Image.Image], path: Path, frame_ms: int = 80) -> None:
    """Write frames of one size as an animated PNG that loops without end and pauses on its last frame.

    frame_ms: duration of a frame in milliseconds. Unlike a GIF, which is limited to 256 colours, an animated PNG keeps
    every grey and colour; viewers without animation show the first frame.
    """
    durations = [frame_ms] * (len(frames) - 1) + [LAST_FRAME_MS]
    first, *rest = (_bare(frame) for frame in frames)
    first.save(path, format="PNG", save_all=True, append_images=rest, duration=durations, loop=0)


def _tiles(images: np.ndarray, scale: int) -> np.ndarray:
    """Enlarge images to opaque RGBA: uint8 [N, C, H, W] -> uint8 [N, H * scale, W * scale, 4]."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"images must be uint8 [N, 1 or 3, H, W] with N >= 1, not {images.dtype} {images.shape}")
    colours = np.repeat(images, 3, axis=1) if images.shape[1] == 1 else images
    opaque = np.concatenate([colours, np.full_like(colours[:, :1], 255)], axis=1).transpose(0, 2, 3, 1)
    return opaque.repeat(scale, axis=1).repeat(scale, axis=2)


def _check_titles(name: str, titles: Sequence[str] | None, needed: int) -> None:
    if titles is not None and len(titles) != needed:
        raise ValueError(f"{name} has {len(titles)} entries, but the grid needs {needed}")


def _truncated(title: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(title) <= width:
        return title
    while title and font.getlength(f"{title}..") > width:
        title = title[:-1]
    return f"{title}.."


def _bare(image: Image.Image) -> Image.Image:
    """Return a copy without the metadata that Pillow would write."""
    bare = image.copy()
    bare.info = {}
    return bare


def squared_errors(first: np.ndarray, second: np.ndarray) -> list[float]:
    """Return the mean squared error of each pair of images, float [N, C, H, W] in [-1, 1]."""
    errors: list[float] = ((first.astype(np.float64) - second) ** 2).mean(axis=(1, 2, 3)).tolist()
    return errors


def decibel(error: float) -> float:
    """Return the PSNR in dB of a mean squared error of values in [-1, 1], a range of 2; NaN stays NaN."""
    return EQUAL_DB if error == 0 else min(10 * math.log10(4 / error), EQUAL_DB)
