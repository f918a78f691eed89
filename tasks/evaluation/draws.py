"""Drawing the samples of an evaluation: seed blocks, labels in a balanced cycle, and the time they took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from models.device import devices_of
from models.images.pixels import to_uint8
from tasks.evaluation.extraction import Images, Part
from tasks.evaluation.protocol import require_pipeline
from tasks.runtime.measures import draw_name
from tasks.runtime.progress import progress

if TYPE_CHECKING:
    from models.noise.samplers import Sampling
    from models.pipeline import Pipeline
    from tasks.evaluation.protocol import Protocol

TEACHER = "teacher"
"""Companion with the weights before consistency tuning."""
BLOCK_STRIDE = 1_000_000
"""Distance between the first seeds of two seed blocks."""


@dataclass(frozen=True)
class Draw:
    """Images drawn from one pipeline with one setting of the sampler."""

    sampling: Sampling
    labels: list[int] | None
    """Requested class of each image; None for an unconditional model."""
    drawn: np.ndarray
    """All images that were drawn together, uint8 [M, C, S, S]."""
    seconds: float
    """Wall time for the N images."""
    weights: str = ""
    """Name of the companion that was drawn from; empty for the pipeline's own weights."""
    count: int | None = None
    """N, if only the first ones of `drawn` belong to this draw, see `first`."""

    @property
    def pixels(self) -> np.ndarray:
        """uint8 [N, C, S, S], a view."""
        return self.drawn[: self.count]

    @property
    def images(self) -> Images:
        """The images as rows of `drawn`, so that what is known of them is not computed again."""
        return Images.of(self.drawn, np.arange(len(self.pixels)))

    @property
    def name(self) -> str:
        """The settings in words, see `draw_name`."""
        return _name(self.sampling, self.weights)

    def first(self, count: int) -> Draw:
        """Return the images of the first `count` seeds, with their share of the time."""
        known = len(self.pixels)
        share = count / max(count, known)
        labels = self.labels[:count] if self.labels is not None else None
        return replace(self, labels=labels, count=min(count, known), seconds=self.seconds * share)


def _name(sampling: Sampling, weights: str) -> str:
    name = draw_name(sampling.sampler, sampling.steps, sampling.guidance_scale, sampling.eta, sampling.guidance)
    return f"{weights}: {name}" if weights else name


def compile_first(pipeline: Pipeline, protocol: Protocol) -> None:
    """Draw images with each network and kind of guidance in one step, so that no draw is timed while it compiles.

    There is one batch for each device. Nothing is drawn if the networks are not compiled.
    """
    if pipeline.compiler is None:
        return
    measurement, size = protocol.measurement, protocol.batch_size
    seeds = range(size * (len(devices_of(pipeline.device)) - 1) + 1)
    labels = None if measurement.labels is None else [0] * len(seeds)
    plain = replace(protocol.unguided, steps=1, guidance_interval=None)
    guided = [replace(plain, guidance_scale=2.0, guidance="auto")] if "guide" in pipeline.companions else []
    guided += [replace(plain, guidance_scale=2.0)] if labels is not None else []
    for sampling in (plain, *guided):
        pipeline.sample(seeds, labels, sampling, batch_size=size)
    if teacher := pipeline.companions.get(TEACHER):
        replace(pipeline, network=teacher).sample(seeds, labels, plain, batch_size=size)


def draw_blocks(pipeline: Pipeline, protocol: Protocol) -> tuple[list[Draw], list[Draw]]:
    """Draw every seed block: unguided images, and guided ones from the same seeds if the protocol has any.

    Raises:
        NotComparableError: if the pipeline draws images of other classes or another shape.
    """
    measurement = protocol.measurement
    require_pipeline(pipeline, measurement)
    unguided, guided = [], []
    for block in range(measurement.seed_blocks):
        unguided.append(draw(pipeline, protocol, measurement.n_distance, protocol.unguided, block))
        if protocol.guided is not None:
            guided.append(draw(pipeline, protocol, measurement.n_accuracy, protocol.guided, block))
    return unguided, guided


def draw(
    pipeline: Pipeline, protocol: Protocol, count: int, sampling: Sampling, block: int = 0, weights: str = ""
) -> Draw:
    """Draw the first `count` images of a seed block; their labels are a balanced cycle over the classes.

    `weights` is the name of a companion whose weights take the place of the pipeline's.
    """
    measurement = protocol.measurement
    if weights:
        pipeline = replace(pipeline, network=pipeline.companions[weights])
    first = measurement.seed + block * BLOCK_STRIDE
    labels = balanced_labels(count, len(measurement.labels)) if measurement.labels is not None else None
    started = time.perf_counter()
    name = _name(sampling, weights)
    with progress(desc=f"draw: {name}", total=count * sampling.steps, unit="step", unit_scale=True) as bar:
        images = pipeline.sample(
            range(first, first + count),
            labels,
            sampling,
            batch_size=protocol.batch_size,
            callback=lambda i, t, x, x0: bar.update(len(x)),
        )
    return Draw(sampling, labels, to_uint8(images), time.perf_counter() - started, weights)


def of_class(draws: Sequence[Draw], label: int) -> Images:
    """Return the images of all draws with this requested class."""
    return Images(tuple(Part(draw.drawn, np.flatnonzero(np.asarray(draw.labels) == label)) for draw in draws))


def balanced_labels(count: int, classes: int) -> list[int]:
    """Return 0, 1, ... classes - 1, 0, 1, ... of length `count`."""
    return [index % classes for index in range(count)]
