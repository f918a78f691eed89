"""Animations with a caption in every frame, as PNG and WebP and, where a codec is installed, as MP4.

Animated PNG and WebP are written without loss and loop; MP4 is for programs that show neither.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from models.images.pictures import LAST_FRAME_MS, TITLE_COLOUR, TITLE_GAP, save_animation
from tasks.runtime.errors import StageError

CAPTION_SIZE, CAPTION_SHARE = 15, 28
"""Least height of a caption in pixels, and the part of the frame's width that it has in wider frames: a telephone shows
them at half their width."""
FONT = Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
"""Pillow's own font lacks the minus sign."""
PAPER = (16, 19, 24)
"""The background of an MP4, which has no transparency: that of the dark page."""
CODEC = "mp4v"
"""MPEG-4 part 2: OpenCV's build contains its encoder, which is fast and gives the same bytes in every run."""
FRAMES_PER_SECOND = 10


@dataclass(frozen=True)
class Animation:
    """Frames of one size, RGBA, with a caption each."""

    frames: Sequence[Image.Image]
    frame_ms: int
    alt: str
    """What it shows, in one sentence."""

    @property
    def still(self) -> Image.Image:
        """The frame for readers who prefer reduced motion: the last one."""
        return self.frames[-1]

    def png(self) -> bytes:
        """Encode an animated PNG."""
        with tempfile.TemporaryDirectory() as folder:
            save_animation(self.frames, Path(folder) / "a.png", self.frame_ms)
            return (Path(folder) / "a.png").read_bytes()


def captioned(frames: Sequence[Image.Image], texts: Sequence[str]) -> list[Image.Image]:
    """Return frames of one size with a line of text above each, RGBA; all are as wide as the widest text needs."""
    size = max(CAPTION_SIZE, frames[0].width // CAPTION_SHARE)
    font = ImageFont.truetype(str(FONT), size)
    width = max(frames[0].width, *(math.ceil(font.getlength(text)) + 2 * TITLE_GAP for text in texts))
    height = size + 2 * TITLE_GAP
    found = []
    for frame, text in zip(frames, texts, strict=True):
        canvas = Image.new("RGBA", (width, frame.height + height))
        canvas.paste(frame, (0, height))
        ImageDraw.Draw(canvas).text((TITLE_GAP, height // 2), text, TITLE_COLOUR, font, anchor="lm")
        found.append(canvas)
    return found


def save_webp(animation: Animation, path: Path) -> None:
    """Write an animated WebP without loss that loops and pauses on its last frame."""
    first, *rest = animation.frames
    durations = [animation.frame_ms] * len(rest) + [LAST_FRAME_MS]
    # Lossless, so `quality` is effort: as small as with quality 60 and the default method, in a fifth of the time.
    first.save(
        path,
        format="WEBP",
        save_all=True,
        append_images=rest,
        duration=durations,
        loop=0,
        lossless=True,
        quality=30,
        method=1,
    )


def save_mp4(animation: Animation, path: Path) -> bool:
    """Write an MP4; returns False, and writes nothing, if OpenCV has no encoder for `CODEC`.

    Raises:
        StageError: if the file has not every frame afterwards. OpenCV reports no error of the disk.
    """
    pictures = [_opaque(frame) for frame in animation.frames]
    height, width = pictures[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*CODEC), FRAMES_PER_SECOND, (width, height))
    if not writer.isOpened():
        path.write_bytes(bytes(height * width))  # a full disk ends the stage here
        path.unlink()
        return False
    written = 0
    for number, picture in enumerate(pictures):
        shown_ms = LAST_FRAME_MS if number == len(pictures) - 1 else animation.frame_ms
        for _ in range(max(1, round(shown_ms * FRAMES_PER_SECOND / 1000))):
            writer.write(picture)
            written += 1
    writer.release()
    if (readable := _frames_in(path)) != written:
        raise StageError(f"{path.name} has {readable} of {written} frames; free space on the disk and run this again")
    return True


def _frames_in(path: Path) -> int:
    """Number of frames that can be decoded."""
    video, count = cv2.VideoCapture(str(path)), 0
    while video.grab():
        count += 1
    video.release()
    return count


def _opaque(frame: Image.Image) -> np.ndarray:
    """Lay a frame on `PAPER` and pad it to even sides, which video codecs need: uint8 [H, W, 3], BGR."""
    canvas = Image.new("RGBA", (frame.width + frame.width % 2, frame.height + frame.height % 2), (*PAPER, 255))
    canvas.alpha_composite(frame)
    return np.ascontiguousarray(np.asarray(canvas.convert("RGB"))[..., ::-1])
