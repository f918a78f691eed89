"""The held-out images that stage `edit` edits, what each is asked to become, and the images it compares them with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from tasks.params import ImageParams
from tasks.pictures.images import load_pixels
from tasks.pictures.samples import held_out_rows
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from pathlib import Path

    from models.judges.judge import Judge
    from models.pipeline import Pipeline
    from tasks.params import EditParams
    from tasks.pictures.samples import Samples, Split

TRAINING_IMAGES = 1024
"""Training images among which the one to copy from is searched, at most."""


class Condition(TypedDict, total=False):
    """Arguments of `Pipeline.sample`; empty for an unconditional model."""

    labels: list[int]
    prompts: list[str]


@dataclass(frozen=True)
class Subjects:
    """Images uint8 [N, C, S, S] with two conditions each."""

    pixels: np.ndarray
    own: Condition
    """What the images show."""
    asked: Condition
    """What image-to-image is asked to make of them: the next class, or the caption of another image."""
    titles: list[str]
    """Such as "three to four"; empty texts for an unconditional model."""
    reference: np.ndarray
    """Held-out images that are not edited, uint8 [M, C, S, S]."""
    training: np.ndarray
    """Training images to copy patches from, uint8 [K, C, S, S]."""

    @property
    def conditional(self) -> bool:
        """Whether there is anything to ask for."""
        return bool(self.asked)


def choose(images: Path, model: Pipeline, params: EditParams) -> Subjects:
    """Choose the images: spread over the held-out split, and at most half of it.

    Of more than `HELD_OUT` held-out images the rest is not read.

    Raises:
        StageError: if there are too few held-out images with the condition that the model needs.
    """
    shape = ImageParams.model_validate({"resolution": model.info.size, "channels": model.info.channels})

    def kept(split: Split) -> np.ndarray:
        return np.sort(np.random.default_rng(params.seed).permutation(len(split.keys))[:TRAINING_IMAGES])

    held_out = load_pixels(images, "test", shape, held_out_rows).only_read()
    train = load_pixels(images, "train", shape, kept)
    known = held_out.with_condition(model.info.conditioning)
    count = min(params.n_images, len(known) // 2)
    if count < 2:
        raise StageError(
            f"{len(known)} held-out images with a {model.info.conditioning} condition are too few to edit; hold out 4 "
            "or more, or set edit.n_images to 0"
        )
    rows = known[np.linspace(0, len(known) - 1, count).round().astype(int)]
    own, asked, titles = _conditions(held_out, rows, model)
    others = np.setdiff1d(np.arange(len(held_out.keys)), rows)
    return Subjects(held_out.pixels[rows], own, asked, titles, held_out.pixels[others], train.pixels)


def _conditions(samples: Samples, rows: np.ndarray, model: Pipeline) -> tuple[Condition, Condition, list[str]]:
    if model.info.conditioning == "none":
        return {}, {}, [""] * len(rows)
    if model.info.conditioning == "label":
        names, labels = model.info.classes, samples.labels[rows].tolist()
        asked = [(label + 1) % len(names) for label in labels]
        titles = [f"{names[a]} to {names[b]}" for a, b in zip(labels, asked, strict=True)]
        return {"labels": labels}, {"labels": asked}, titles
    captions = [samples.captions[row][0] for row in rows]
    turned = [*captions[len(captions) // 2 :], *captions[: len(captions) // 2]]
    return {"prompts": captions}, {"prompts": turned}, [""] * len(rows)


def agreement(judge: Judge, pixels: np.ndarray, wanted: Condition, other: Condition) -> float | None:
    """Return the share of images that the judge assigns to the condition `wanted`.

    For labels that is the classifier's class; for prompts the CLIP's choice between the prompt wanted and the other,
    without the images for which both are equal. None for a judge without classifier or CLIP.
    """
    if "labels" in wanted and judge.classifier is not None:
        chosen = judge.class_logits(pixels).argmax(axis=1)
        return float((chosen == np.asarray(wanted["labels"])).mean())
    if "prompts" in wanted and judge.reads_captions:
        differ = np.array([a != b for a, b in zip(wanted["prompts"], other["prompts"], strict=True)])
        if differ.any():
            embeds = judge.clip_image_embeds(pixels)
            to_wanted, to_other = (
                (embeds * judge.clip_text_embeds(prompts["prompts"])).sum(axis=1) for prompts in (wanted, other)
            )
            return float((to_wanted > to_other)[differ].mean())
    return None
