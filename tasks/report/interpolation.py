"""Pictures between two samples: between their noises, and between their labels or prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.images.pixels import to_uint8
from models.interpolation import Pair, between_conditions, between_noises
from tasks.report.page import Figure, Tiles
from tasks.report.shortened import shortened

if TYPE_CHECKING:
    from models.pipeline import Pipeline
    from tasks.params import VisualizeParams
    from tasks.report.process import Drawn

SHARES = tuple(step / 8 for step in range(9))
COLUMNS = [f"{share:g}" for share in SHARES]
ROWS = 3
LARGE_IMAGE = 64
"""Images with a larger side are drawn in batches of `visualize.columns`, smaller ones all at once."""
NOISES_TEXT = (
    "Above the columns: the share of the second noise (spherical interpolation, Shoemake 1985; Song et al. 2021, "
    "section 5.3). A deterministic sampler turns neighbouring noises into similar images."
)
CONDITIONS_TEXT = "Above the columns: the share of the second embedding, on the straight line between the two."


def figures(model: Pipeline, drawn: Drawn, params: VisualizeParams) -> dict[str, Figure]:
    """Return the pictures `between_noises` and `between_conditions`; the second is a sentence without conditions."""
    batch = ROWS * len(SHARES) if model.info.size <= LARGE_IMAGE else params.columns
    count = len(drawn.names)
    pairs = [_pair(drawn, params.seed, first, first + max(1, count // 2)) for first in range(min(ROWS, count))]
    sampling = params.sampling(drawn.scale)
    images = to_uint8(between_noises(model, pairs, SHARES, sampling, batch))
    titles = [shortened(name) for name in drawn.names[:ROWS]]
    if not any(titles):
        titles = ["seeds {} to {}".format(*pair.seeds) for pair in pairs]
    same = ", for the same condition" if drawn.labels is not None else ""
    text = [f"From the noise of one seed to that of another{same}, on the arc that keeps its norm. {NOISES_TEXT}"]
    label = "Images between two noises, by share of the second"
    return {
        "between_noises": Figure("Between two noises", text, Tiles(images, titles, COLUMNS), label),
        "between_conditions": _conditions(model, drawn, params, pairs, batch),
    }


def _pair(drawn: Drawn, seed: int, first: int, second: int) -> Pair:
    labels = (drawn.labels[first], drawn.labels[second % len(drawn.labels)]) if drawn.labels is not None else None
    return Pair((seed + first, seed + second), labels)


def _conditions(model: Pipeline, drawn: Drawn, params: VisualizeParams, pairs: list[Pair], batch: int) -> Figure:
    what = "prompts" if model.text is not None else "labels"
    title = f"Between two {what}"
    different = [pair for pair in pairs if pair.labels and pair.labels[0] != pair.labels[1]]
    if not different:
        reason = "All samples have the same condition" if drawn.labels else "This model is unconditional"
        return Figure(title, [f"{reason}, so there are no conditions to interpolate."])
    images = to_uint8(between_conditions(model, different, SHARES, params.sampling(drawn.scale), batch))
    titles = [" to ".join(shortened(model.info.classes[label]) for label in pair.labels or ()) for pair in different]
    text = [f"The same noise, and the embedding moved from one of the {what} to the other. {CONDITIONS_TEXT}"]
    label = f"Images between two {what}, by share of the second"
    return Figure(title, text, Tiles(images, titles, COLUMNS), label)
