"""How well the images of a ControlNet follow their control maps, beside what chance and the U-Net alone reach.

Every image is drawn for the caption and the control map of a held-out image. The same agreement with that map is then
measured of images drawn with the map of another held-out image, without a map, and of the held-out image itself after
the codec. All are drawn from the same seeds. A model that ignores its map scores alike with the right and another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from models.images.pixels import to_uint8
from models.networks.control_maps import agreement, as_input
from tasks.evaluation.draws import BLOCK_STRIDE
from tasks.runtime.measures import ControlMeasured
from tasks.runtime.progress import progress

if TYPE_CHECKING:
    from models.denoising import Conditions
    from models.pipeline import Pipeline
    from tasks.evaluation.protocol import Protocol
    from tasks.evaluation.scorer import Scorer

IMAGES = 64
"""Held-out images, and samples in each seed block, at most."""
SHOWN = 8


@dataclass(frozen=True)
class Controlled:
    """The measurement, and the first images of the first seed block for the grid, uint8 [rows, SHOWN, C, H, W]."""

    measured: ControlMeasured
    rows: np.ndarray
    titles: Sequence[str] = ("map", "image", "with its map", "without a map", "with the next map")


def measure_control(pipeline: Pipeline, scorer: Scorer, protocol: Protocol) -> Controlled | None:
    """Draw with control maps of held-out images and measure the agreement; None for a model without a ControlNet."""
    spec = pipeline.info.control_spec
    if spec is None or pipeline.control is None:
        return None
    pixels, conditions = scorer.held_out_for(pipeline.info.conditioning, IMAGES)
    if len(pixels) < 2:
        return None
    maps = scorer.control_maps(spec, scorer.held_out_rows(pipeline.info.conditioning, IMAGES))
    blocks = [_draw(pipeline, protocol, block, maps, conditions) for block in range(protocol.measurement.seed_blocks)]
    scores = {
        name: np.array([agreement(spec, maps, block[name]).mean() for block in blocks])
        for name in ("own", "none", "next")
    }
    real = to_uint8(pipeline.decode(pipeline.encode(pixels)).float().cpu().numpy())
    measured = ControlMeasured(
        kind=spec.kind,
        n=len(pixels),
        value=_rounded(scores["own"].mean()),
        spread=_rounded(scores["own"].std(ddof=1)),
        shuffled=_rounded(scores["next"].mean()),
        base=_rounded(scores["none"].mean()),
        real=_rounded(agreement(spec, maps, real).mean()),
    )
    shown = _as_pictures(maps, pixels)
    pictures = [shown, pixels, *(blocks[0][name] for name in ("own", "none", "next"))]
    return Controlled(measured, np.stack([images[:SHOWN] for images in pictures]))


def _draw(
    pipeline: Pipeline, protocol: Protocol, block: int, maps: np.ndarray, conditions: Conditions
) -> dict[str, np.ndarray]:
    """Draw a seed block with the own maps, without and with those of the next image, uint8 [N, C, S, S] each."""
    first = protocol.measurement.seed + block * BLOCK_STRIDE
    sampling = protocol.guided or protocol.unguided
    drawn = {}
    for name, control in {"own": maps, "none": None, "next": np.roll(maps, -1, axis=0)}.items():
        with progress(desc=f"control: {name}", total=len(maps) * sampling.steps, unit="step", unit_scale=True) as bar:
            images = pipeline.sample(
                range(first, first + len(maps)),
                conditions.get("labels"),
                sampling,
                prompts=conditions.get("prompts"),
                batch_size=protocol.batch_size,
                callback=lambda i, t, x, x0: bar.update(len(x)),
                control=control,
            )
        drawn[name] = to_uint8(images)
    return drawn


def _as_pictures(maps: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Return maps at the resolution and with the channels of the images, uint8."""
    shown = (as_input(torch.tensor(maps), *pixels.shape[2:]) * 255).round().to(torch.uint8).numpy()
    return shown[:, : pixels.shape[1]]


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
