"""The result as HTML: a tile for each image, their progress and settings."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

import PIL.Image

from models.images.pixels import to_uint8

if TYPE_CHECKING:
    import numpy as np

    from infra.demo.studio import Drawing
    from tasks.drawing.settings import Settings

WIDTHS = ((1, 512), (4, 256), (12, 144))
"""Number of images -> width of a tile, CSS pixels."""
LEAST_WIDTH = 96
PIXELATED = 128
"""Images of at most this side are enlarged by whole factors without smoothing."""
EMPTY = "<div class='result'><p class='status'>The images appear here.</p></div>"


def shown(drawing: Drawing, stopped: bool = False) -> str:
    """Return the images of a drawing, and its progress or its settings; `stopped` before the last step."""
    images = to_uint8(drawing.progress.images)
    width = _width(len(images), images.shape[-1])
    titles = list(_titles(drawing))
    tiles = "".join(_tile(image, title, width) for image, title in zip(images, titles, strict=True))
    return f"<div class='result'>{_progress(drawing, stopped)}<div class='tiles'>{tiles}</div></div>"


def refused(sentence: str) -> str:
    """Return an error, HTML, in the place of the images."""
    return f"<div class='result'><p class='status refused' role='alert'>{sentence}</p></div>"


def _width(count: int, side: int) -> int:
    most = next((width for limit, width in WIDTHS if count <= limit), LEAST_WIDTH)
    return max(1, most // side) * side if side <= PIXELATED else most


def _tile(image: np.ndarray, title: str, width: int) -> str:
    """Return a figure of one image, uint8 [C, S, S]."""
    kind, words = "pixelated" if image.shape[-1] <= PIXELATED else "smooth", html.escape(title)
    source = f"data:image/webp;base64,{_webp(image)}"
    return (
        f"<figure style='width:{width}px'><img class='{kind}' width='{width}' height='{width}' alt='{words}' "
        f"src='{source}'><figcaption>{words}</figcaption></figure>"
    )


def _titles(drawing: Drawing) -> Iterator[str]:
    """Yield a title for each image: its label or prompt, and its seed if there are several."""
    planned = drawing.planned
    for seed in planned.settings.seeds:
        for title in planned.titles or [""]:
            several = len(planned.settings.seeds) > 1 or not title
            yield " · ".join([*([title] if title else []), *([f"seed {seed}"] if several else [])])


def _progress(drawing: Drawing, stopped: bool) -> str:
    now = drawing.progress
    if now.finished:
        return f"<p class='status' role='status'>{html.escape(_words(drawing.planned.settings, len(now.images)))}</p>"
    percent = 100 * now.done // now.total
    if stopped:
        return (
            f"<p class='status' role='status'>Stopped after {percent} % of {drawing.planned.settings.steps} steps.</p>"
        )
    bar = f"<progress value='{now.done}' max='{now.total}' aria-label='progress'></progress>"
    return f"{bar}<p class='status'>Drawing: {percent} % of {drawing.planned.settings.steps} steps</p>"


def _words(settings: Settings, count: int) -> str:
    first, last = settings.seeds[0], settings.seeds[-1]
    seeds = f"seed {first}" if first == last else f"seeds {first} to {last}"
    images = f"{count} image{'s' if count > 1 else ''}"
    return f"{images}, {seeds}, {settings.sampler}, {settings.steps} steps, guidance {settings.guidance:g}"


def _webp(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    PIL.Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, method=0)
    return base64.b64encode(buffer.getvalue()).decode()
