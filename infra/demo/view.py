"""The result as HTML: the images, enlarged, with their progress and settings."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import replace
from typing import TYPE_CHECKING

from models.images.pixels import to_uint8

if TYPE_CHECKING:
    import PIL.Image

    from infra.demo.studio import Drawing

SIDE = 640
"""Width at which a drawing is shown, CSS pixels, about."""
PIXELATED = 128
"""Images of at most this side are enlarged by repetition, others smoothly."""
EMPTY = "<div class='result'><p class='status'>The images appear here.</p></div>"


def shown(drawing: Drawing) -> str:
    """Return the images of a drawing and its progress."""
    layout, images = drawing.planned.layout, to_uint8(drawing.progress.images)
    side = images.shape[-1]
    scale = max(1, SIDE // (layout.columns * side))
    picture = replace(layout, scale=scale).picture(images)
    kind = "pixelated" if side <= PIXELATED else "smooth"
    source, words = _data(picture), html.escape(_words(drawing))
    size = f"width='{picture.width}' height='{picture.height}'"
    return f"<div class='result'><img class='{kind}' {size} alt='{words}' src='{source}'>{_progress(drawing)}</div>"


def _progress(drawing: Drawing) -> str:
    now = drawing.progress
    if now.finished:
        return f"<p class='status' role='status'>{html.escape(_words(drawing))}</p>"
    steps = drawing.planned.settings.steps
    return f"<progress value='{now.done}' max='{now.total}'></progress><p class='status'>Drawing in {steps} steps</p>"


def _words(drawing: Drawing) -> str:
    settings, count = drawing.planned.settings, len(drawing.progress.images)
    what = ", ".join(dict.fromkeys(map(str, settings.prompts or settings.labels)))
    parts = [f"{count} image{'s' if count > 1 else ''}", *([what] if what else []), f"seed {settings.seeds[0]}"]
    if len(settings.seeds) > 1:
        parts[-1] = f"seeds {settings.seeds[0]} to {settings.seeds[-1]}"
    return " · ".join([*parts, settings.sampler, f"{settings.steps} steps", f"guidance {settings.guidance:g}"])


def _data(picture: PIL.Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True, method=0)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
