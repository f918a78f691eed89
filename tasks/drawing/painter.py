"""A pipeline of PyTorch as a `models.request.Model`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from models.editing import edit

if TYPE_CHECKING:
    import numpy as np

    from models.noise.samplers import Callback
    from models.pipeline import Pipeline, PipelineInfo
    from models.request import Drawing

BATCH_PIXELS = 256 * 64 * 64
"""Most pixels that are drawn at once: 256 images of 64 x 64, or 4 of 512 x 512."""
MAX_BATCH = 256


@dataclass(frozen=True)
class Painter:
    """Draws checked requests with a pipeline."""

    pipeline: Pipeline
    most: int = MAX_BATCH
    """Most images that are drawn at once."""

    @property
    def info(self) -> PipelineInfo:
        """What the pipeline draws."""
        return self.pipeline.info

    @property
    def batch_size(self) -> int:
        """Images that are drawn at once."""
        return max(1, min(self.most, BATCH_PIXELS // self.info.size**2))

    def paint(self, drawing: Drawing, callback: Callback | None = None) -> np.ndarray:
        """Draw the images of a checked request, float32 [N, C, H, W], about [-1, 1].

        Raises:
            ValueError: for a sampler, number of steps or guidance that the model does not have.
        """
        pipeline = replace(self.pipeline, negative_prompt=drawing.negative_prompt)
        rest: dict[str, Any] = {  # keyword arguments of several types
            "labels": drawing.labels,
            "sampling": drawing.sampling,
            "prompts": drawing.prompts,
            "batch_size": self.batch_size,
            "callback": callback,
        }
        if drawing.given is None:
            return pipeline.sample(drawing.seeds, control=drawing.control, control_scale=drawing.control_scale, **rest)
        return edit(pipeline, drawing.seeds, drawing.given.images, drawing.given.strength, drawing.given.mask, **rest)
