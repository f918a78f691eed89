"""What the command draws with where the user says nothing: as the model was evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from models.noise.samplers import DEFAULT_SAMPLING, Sampling
from models.pipeline import INFO
from tasks.runtime import integrity, measures
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from models.pipeline import PipelineInfo
    from tasks.drawing.place import Place

CONDITIONS = 10
"""Most classes or example prompts that are drawn if none is given."""
PUBLISHED_GUIDANCE = 7.5
"""Guidance scale of published text-to-image models, the default of diffusers' pipelines."""
TRAINING = Path("reports/train/run.json")


def sampling(place: Place, info: PipelineInfo) -> Sampling:
    """Return the settings of the model's evaluation, guided if it has a condition.

    A model without an evaluation gets `DEFAULT_SAMPLING`, and a published text-to-image model guidance as well.
    """
    measured = _measured(place, info)
    conditional = info.conditioning != "none"
    if measured is None:
        published = info.conditioning == "text" and not (place.folder / INFO).exists()
        steps = min(DEFAULT_SAMPLING.steps, info.timesteps)
        return Sampling(steps=steps, guidance_scale=PUBLISHED_GUIDANCE if published else 1.0)
    scale = measured.guided_scale if conditional and measured.guided_scale is not None else 1.0
    return Sampling(
        measured.sampler,
        measured.steps,
        measured.eta,
        scale,
        measured.guidance_interval if scale != 1 else None,
        measured.guided_kind or DEFAULT_SAMPLING.guidance,
    )


def _measured(place: Place, info: PipelineInfo) -> measures.Measurements | None:
    """Return the evaluation of these weights; None if there is none, or if it is of other weights."""
    if place.measurements is None or not place.measurements.is_file():
        return None
    try:
        # beside a registered model lies its own evaluation; in the work tree the training may be newer
        own = place.folder.parent == place.measurements.parent
        if not own and integrity.read_json(TRAINING, "train").get("train_key") != info.train_key:
            return None
        return measures.read(place.measurements)
    except StageError:
        return None


def conditions(info: PipelineInfo) -> tuple[tuple[int | str, ...], tuple[str, ...]]:
    """Return (labels, prompts): the first classes, or examples of captions.

    Raises:
        StageError: for a text-conditional model without examples.
    """
    if info.conditioning == "none":
        return (), ()
    if info.conditioning == "label":
        return tuple(range(min(CONDITIONS, len(info.classes)))), ()
    examples = tuple((info.prompts or info.classes)[:CONDITIONS])
    if not examples:
        raise StageError("this model draws text; give --prompt")
    return (), examples
