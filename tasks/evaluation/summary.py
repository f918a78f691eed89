"""From drawn samples to `measurements.json`: means and spreads over the seed blocks, beside their references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.images.pictures import decibel, squared_errors
from models.networks import compilation
from models.networks.precision import in_precision
from tasks.evaluation.control import measure_control
from tasks.evaluation.draws import Draw, balanced_labels, draw_blocks
from tasks.evaluation.scorer import Scorer
from tasks.runtime.measures import ControlMeasured, Drawn, Measure, Measurements, PrecisionMeasured

if TYPE_CHECKING:
    from models.judges.judge import Judge
    from models.noise.samplers import Sampling
    from models.pipeline import Pipeline
    from tasks.evaluation.protocol import Protocol

PARITY_IMAGES = 8
"""Images that are drawn in a lower precision and in float32."""
CLIP_IS_CONDITION = "taken with the weights that condition the model, so it flatters"


def measure(pipeline: Pipeline, images: Path, judge: Judge, protocol: Protocol) -> Measurements:
    """Draw from `pipeline` and measure the samples by `protocol`; `images` is the folder of the data set.

    Raises:
        NotComparableError: if pipeline, images or judge do not fit the protocol.
    """
    scorer = Scorer(images, judge, protocol)
    pipeline = in_precision(pipeline, protocol.precision)
    if compilation.wanted(protocol.compile):
        pipeline = compilation.compiled_pipeline(pipeline)
    controlled = measure_control(pipeline, scorer, protocol)
    control = controlled.measured if controlled else None
    parity = Parity(compiled=pipeline.compiler is not None)
    return summarise(*draw_blocks(pipeline, protocol), scorer, protocol, control, parity)


@dataclass(frozen=True)
class Parity:
    """How far the network that draws is from those that should draw the same images."""

    compiled: bool = False
    """Whether it is compiled."""
    with_float32: PrecisionMeasured | None = None
    """None for float32, and where it was not measured."""
    with_uncompiled: PrecisionMeasured | None = None
    """In the same precision; None for an uncompiled network, and where it was not measured."""


def measure_parity(in_float32: Pipeline, uncompiled: Pipeline, drawing: Pipeline, protocol: Protocol) -> Parity:
    """Compare the pipeline `drawing` with float32, and with an uncompiled network in the same precision.

    Each draws the first images of the first seed block, with the protocol's guidance if it has any.
    """
    measurement = protocol.measurement
    seeds = range(measurement.seed, measurement.seed + PARITY_IMAGES)
    labels = None if measurement.labels is None else balanced_labels(PARITY_IMAGES, len(measurement.labels))

    def draw(pipeline: Pipeline) -> np.ndarray:
        sampling = protocol.guided or protocol.unguided
        return pipeline.sample(seeds, labels, sampling, batch_size=protocol.batch_size).clip(-1, 1)

    lower, compiled = drawing.precision != "no", drawing.compiler is not None
    if not (lower or compiled):
        return Parity()
    drawn = draw(drawing)
    return Parity(
        compiled,
        _compared(drawn, draw(in_float32)) if lower else None,
        _compared(drawn, draw(uncompiled)) if compiled else None,
    )


def _compared(drawn: np.ndarray, expected: np.ndarray) -> PrecisionMeasured:
    errors = squared_errors(drawn, expected)
    return PrecisionMeasured(
        n=len(errors), psnr_db=round(decibel(float(np.mean(errors))), 2), worst_psnr_db=round(decibel(max(errors)), 2)
    )


def summarise(
    unguided: Sequence[Draw],
    guided: Sequence[Draw],
    scorer: Scorer,
    protocol: Protocol,
    control: ControlMeasured | None = None,
    parity: Parity = Parity(),
) -> Measurements:
    """Score the draws of all seed blocks, and the references: training images for the floor, and held-out images.

    `control` is the agreement with control maps, which `measure_control` measured, and `parity` is what
    `measure_parity` found.
    """
    measurement, sampling = protocol.measurement, protocol.unguided
    blocks = [
        scorer.distances(draw.images) | scorer.inception_style_score(draw.images) | scorer.near_copies(draw.images)
        for draw in unguided
    ]
    fits = [scorer.fit_to_labels(draw.images, draw.labels) for draw in guided]
    stand_ins = [scorer.stand_ins(block) for block in range(measurement.seed_blocks)]
    floors = _means_and_spreads([scorer.distances(images) for images in stand_ins])
    real = scorer.real()
    asked = protocol.guided

    def measured(scores: list[dict[str, float]], drawn: Drawn, by: Sampling, n: int) -> dict[str, Measure]:
        result = {}
        for name, (value, spread) in _means_and_spreads(scores).items():
            floor, floor_spread = floors.get(name, (None, None))
            result[name] = Measure(
                value=value,
                spread=spread,
                drawn=drawn,
                guidance_scale=by.guidance_scale,
                guidance_kind=by.guidance if drawn == "guided" else None,
                n=n,
                floor=floor,
                floor_spread=floor_spread,
                real=_rounded(real[name]) if name in real else None,
            )
        return result

    interval = sampling.guidance_interval
    return Measurements(
        fingerprint=protocol.fingerprint,
        headline=protocol.headline,
        sampler=sampling.sampler,
        steps=sampling.steps,
        eta=sampling.eta,
        guidance_interval=(interval[0], interval[1]) if interval else None,
        guided_scale=asked.guidance_scale if asked else None,
        guided_kind=asked.guidance if asked else None,
        precision=protocol.precision if protocol.precision != "no" else None,
        precision_parity=parity.with_float32,
        compiled=parity.compiled or None,
        compile_parity=parity.with_uncompiled,
        seed_blocks=measurement.seed_blocks,
        extractor=measurement.extractor,
        n_samples=measurement.n_distance,
        n_reference=measurement.reference.images,
        n_floor=len(stand_ins[0]),
        n_searched=len(scorer.searched.rows),
        small_n=scorer.small_n(),
        clip_score_note=CLIP_IS_CONDITION if protocol.clip_is_condition else None,
        measures=measured(blocks, "unguided", sampling, measurement.n_distance)
        | (measured(fits, "guided", asked, measurement.n_accuracy) if asked else {}),
        control=control,
        not_applicable=_not_applicable(scorer),
    )


def _means_and_spreads(blocks: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Return the mean of each measure over the seed blocks, and the sample standard deviation."""
    values = {name: [block[name] for block in blocks] for name in (blocks[0] if blocks else ())}
    return {
        name: (_rounded(float(np.mean(found))), _rounded(float(np.std(found, ddof=1))))
        for name, found in values.items()
    }


def _rounded(value: float) -> float:
    """Round to six digits: the last digits of linear algebra depend on the memory alignment of its input."""
    return float(f"{value:.6g}")


def _not_applicable(scorer: Scorer) -> dict[str, str]:
    """Return the reason for each measure that was not taken."""
    reasons = {}
    if scorer.judge.classifier is None:
        reasons["inception_style_score"] = reasons["label_accuracy"] = (
            "the images have no labels to train a classifier on"
        )
    if not scorer.judge.reads_captions:
        reasons["clip_score"] = "the images have no captions to train a CLIP on"
    elif scorer.prompts is None:
        reasons["clip_score"] = "the captions do not follow from the class that the model is asked for"
    if scorer.measurement.labels is None:
        reasons["label_accuracy"] = reasons["clip_score"] = "the model draws without labels or captions"
    return reasons
