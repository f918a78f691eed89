"""Prompts against guidance scales, seeds and steps, for models that take prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from models.images.pixels import to_uint8
from tasks.report.page import Figure, Tiles
from tasks.report.process import spread
from tasks.report.shortened import shortened
from tasks.runtime.measures import guidance_name

if TYPE_CHECKING:
    from models.pipeline import Pipeline
    from tasks.params import VisualizeParams

PROMPTS, SEEDS = 4, 2
GUIDANCE_TEXT = (
    "A column starts from the same noise in every row. With a larger guidance scale w the samples follow the prompt "
    "more closely and vary less."
)
STEPS_TEXT = "Along a row only the number of sampling steps differs."
STEPS = (1, 2, 5, 10, 20, 50)
"""Steps that are compared, as far as they do not exceed `visualize.steps`."""


def figures(model: Pipeline, params: VisualizeParams) -> dict[str, Figure]:
    """Return the pictures `prompts_guidance` and `prompts_steps`; sentences for a model without a text encoder."""
    titles = ("Prompts by guidance and seed", "Prompts by steps")
    if model.text is None:
        why = "It is left out, because this model takes no prompts."
        return {
            name: Figure(title, [why])
            for name, title in zip(("prompts_guidance", "prompts_steps"), titles, strict=True)
        }
    known = model.info.prompts or model.info.classes
    prompts = list(params.prompts) or [known[index] for index in spread(len(known), PROMPTS)]
    middle = params.guidance_scales[len(params.guidance_scales) // 2]
    rows = [shortened(prompt) for prompt in prompts]
    whole = "The prompts: " + "; ".join(f"“{prompt}”" for prompt in prompts) + "."
    return {
        "prompts_guidance": Figure(
            titles[0],
            [GUIDANCE_TEXT, whole],
            Tiles(*_by_guidance(model, params, prompts, rows)),
            "Samples by prompt, guidance scale and seed",
        ),
        "prompts_steps": Figure(
            titles[1],
            [f"All images start from the same noise; the guidance scale is {middle:g}. {STEPS_TEXT}", whole],
            Tiles(*_by_steps(model, params, prompts, rows, middle)),
            "Samples by prompt and number of sampling steps",
        ),
    }


def _by_guidance(
    model: Pipeline, params: VisualizeParams, prompts: list[str], rows: list[str]
) -> tuple[np.ndarray, list[str], list[str], list[str]]:
    """Return images uint8 [P, S G, C, H, W], titles of rows and columns, and the columns' notes."""
    seeds = [params.seed + number for number in range(SEEDS)]
    every = [seed for _ in prompts for seed in seeds], [prompt for prompt in prompts for _ in seeds]
    drawn = [
        to_uint8(model.sample(every[0], sampling=params.sampling(scale), prompts=every[1], batch_size=params.columns))
        for scale in params.guidance_scales
    ]
    by_scale = np.stack(drawn).reshape(len(drawn), len(prompts), len(seeds), *drawn[0].shape[1:])
    images = by_scale.transpose(1, 0, 2, 3, 4, 5).reshape(len(prompts), -1, *drawn[0].shape[1:])
    columns = [f"w = {guidance_name(scale, params.guidance)}" for scale in params.guidance_scales for _ in seeds]
    return images, rows, columns, [f"seed {seed}" for _ in drawn for seed in seeds]


def _by_steps(
    model: Pipeline, params: VisualizeParams, prompts: list[str], rows: list[str], scale: float
) -> tuple[np.ndarray, list[str], list[str]]:
    """Return images uint8 [P, K, C, H, W], and the titles of rows and columns."""
    counts = sorted({steps for steps in STEPS if steps <= params.steps} | {params.steps})
    sampling = params.sampling(scale)
    drawn = [
        to_uint8(
            model.sample(
                [params.seed] * len(prompts),
                sampling=replace(sampling, steps=steps),
                prompts=prompts,
                batch_size=params.columns,
            )
        )
        for steps in counts
    ]
    titles = [f"{steps} step{'s' if steps > 1 else ''}" for steps in counts]
    return np.stack(drawn, axis=1), rows, titles
