"""The files of a drawing: a PNG of one image or of a grid, a folder of PNGs, or an animation of the denoising."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image

from models.images import pictures
from models.images.pixels import to_uint8
from tasks.runtime import atomic
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from tasks.drawing.settings import Settings

DRAWINGS = Path("outputs/drawings")
"""Where files without --out go, numbered."""
ANIMATIONS = {".gif": "GIF", ".webp": "WEBP"}
SUFFIXES = (".png", *ANIMATIONS)
GRID_SIDE = 64
"""Images of a grid are enlarged to at least this many pixels."""
FRAMES = 50
"""Most frames of an animation."""
FRAME_MS, LAST_FRAME_MS = 80, 2400


@dataclass(frozen=True)
class Layout:
    """The arrangement of several images: a row for each seed, a column for each label or prompt."""

    columns: int
    scale: int
    row_titles: tuple[str, ...] | None = None
    column_titles: tuple[str, ...] | None = None

    @classmethod
    def of(cls, seeds: Sequence[int], titles: Sequence[str], side: int, scale: int | None) -> Layout:
        """Arrange len(seeds) x len(titles) images of height and width `side`; without titles nearly square."""
        factor = scale or max(1, math.ceil(GRID_SIDE / side))
        if len(titles) <= 1:
            return cls(math.ceil(math.sqrt(len(seeds))), factor)
        rows = tuple(f"seed {seed}" for seed in seeds) if len(seeds) > 1 else None
        return cls(len(titles), factor, rows, tuple(titles))

    def picture(self, images: np.ndarray) -> PIL.Image.Image:
        """Arrange uint8 images [N, C, H, W]."""
        return pictures.grid(images, self.columns, self.scale, self.row_titles, self.column_titles)


def check(out: Path | None, force: bool) -> Path:
    """Return where to write: `out`, or the next free number in `DRAWINGS`.

    Raises:
        StageError: for an unknown suffix, a folder that does not exist, or a file that exists without `force`.
    """
    if out is None:
        taken = [int(file.stem) for file in DRAWINGS.glob("*.png") if file.stem.isdigit()]
        return DRAWINGS / f"{max(taken, default=0) + 1:04d}.png"
    if out.suffix and out.suffix.lower() not in SUFFIXES:
        raise StageError(f"--out {out} must end in {', '.join(SUFFIXES)}, or be a folder for one PNG per image")
    if not out.parent.is_dir():
        raise StageError(f"--out {out} lies in {out.parent}, which is no folder; make it, or choose another place")
    if out.suffix and out.is_dir():
        raise StageError(f"--out {out} is a folder; name a file")
    if not out.suffix and out.exists() and not out.is_dir():
        raise StageError(f"--out {out} is a file and names a folder; add a suffix, such as .png")
    if out.exists() and not force and (out.suffix or any(out.iterdir())):
        kept = "exists" if out.suffix else "is not empty"
        raise StageError(f"--out {out} {kept}; choose another name, or add --force to overwrite")
    return out


def is_animation(out: Path) -> bool:
    """Whether the file is an animation of the denoising."""
    return out.suffix.lower() in ANIMATIONS


def write_png(out: Path, images: np.ndarray, layout: Layout, scale: int | None, settings: Settings) -> None:
    """Write one image at its own size, or several as a grid; images are float [N, C, H, W] in [-1, 1]."""
    pixels = to_uint8(images)
    picture = _single(pixels[0], scale or 1) if len(pixels) == 1 else layout.picture(pixels)
    atomic.write_bytes(out, _encoded(picture, settings))


def write_folder(out: Path, images: np.ndarray, scale: int | None, each: Sequence[Settings]) -> None:
    """Write one PNG for each image, `0000.png` and so on; `each` are its settings."""
    out.mkdir(exist_ok=True)
    for index, (pixels, settings) in enumerate(zip(to_uint8(images), each, strict=True)):
        atomic.write_bytes(out / f"{index:04d}.png", _encoded(_single(pixels, scale or 1), settings))


def write_animation(out: Path, frames: Sequence[np.ndarray], layout: Layout) -> None:
    """Write the frames, each float [N, C, H, W], as GIF or WebP that loops and pauses on the last frame."""
    kind = ANIMATIONS[out.suffix.lower()]
    shown = [layout.picture(to_uint8(frame)) for frame in _thinned(frames)]
    first, *rest = [_opaque(frame) if kind == "GIF" else frame for frame in shown]
    durations = [FRAME_MS] * len(rest) + [LAST_FRAME_MS]
    buffer = io.BytesIO()
    options = {"lossless": True, "method": 4} if kind == "WEBP" else {"optimize": True}
    first.save(buffer, kind, save_all=True, append_images=rest, duration=durations, loop=0, **options)
    atomic.write_bytes(out, buffer.getvalue())


def _thinned(frames: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return at most `FRAMES` frames, evenly spaced, with the last one."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int))
    return [frames[index] for index in chosen]


def _opaque(frame: PIL.Image.Image) -> PIL.Image.Image:
    """Put a frame on white: GIF has no partial transparency."""
    white = PIL.Image.new("RGBA", frame.size, "white")
    return PIL.Image.alpha_composite(white, frame).convert("RGB")


def _single(pixels: np.ndarray, scale: int) -> PIL.Image.Image:
    """Convert uint8 [C, H, W] to an image, enlarged by repetition."""
    enlarged = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    return PIL.Image.fromarray(enlarged[0] if len(enlarged) == 1 else enlarged.transpose(1, 2, 0))


def _encoded(picture: PIL.Image.Image, settings: Settings) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True, pnginfo=settings.chunk())
    return buffer.getvalue()
