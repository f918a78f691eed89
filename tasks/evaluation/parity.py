"""How near images of a network in a lower precision are to those of float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from models.images.psnr import decibel, squared_errors
from tasks.evaluation.draws import balanced_labels
from tasks.runtime.measures import PrecisionMeasured

if TYPE_CHECKING:
    from models.pipeline import Pipeline
    from tasks.evaluation.protocol import Protocol

IMAGES = 8
"""Images that are drawn in both precisions."""


def measure_parity(in_float32: Pipeline, lower: Pipeline, protocol: Protocol) -> PrecisionMeasured | None:
    """Draw the first images of the first seed block in both precisions; None if there is only float32.

    They are drawn with the protocol's guidance, if it has any.
    """
    if lower.precision == "no":
        return None
    measurement = protocol.measurement
    seeds = range(measurement.seed, measurement.seed + IMAGES)
    labels = None if measurement.labels is None else balanced_labels(IMAGES, len(measurement.labels))
    sampling = protocol.guided or protocol.unguided
    drawn, expected = (
        pipeline.sample(seeds, labels, sampling, batch_size=protocol.batch_size) for pipeline in (lower, in_float32)
    )
    errors = squared_errors(drawn.clip(-1, 1), expected.clip(-1, 1))
    return PrecisionMeasured(
        n=IMAGES, psnr_db=round(decibel(float(np.mean(errors))), 2), worst_psnr_db=round(decibel(max(errors)), 2)
    )
