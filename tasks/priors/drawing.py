"""Images that the base draws by a prompt, kept in the scratch folder by what they depend on.

Each GPU draws a block at a time; the blocks are those of one GPU, and so are the images.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import torch

from models.images.pixels import to_uint8
from models.networks.precision import in_precision
from models.parallel import shared_in_turns
from tasks.encoding.blocks import Blocks
from tasks.runtime import closure, workspace
from tasks.runtime.progress import progress

if TYPE_CHECKING:
    from models.json_files import JsonObject
    from models.pipeline import Pipeline
    from tasks.params import PriorParams


class Drawing:
    """Draws images by seed, in blocks of `prior.batch_size`, and keeps each before the next ones are drawn."""

    def __init__(self, pipeline: Pipeline, base: JsonObject, params: PriorParams) -> None:
        self.pipeline = in_precision(pipeline, params.precision)
        self.params, self.sampling = params, params.sampling
        recipe = {
            "base": base,
            "sampler": [params.sampler, params.steps, params.guidance_scale],
            "images per block": params.batch_size,
            "device": pipeline.device,
            "code": closure.digest("models/pipeline.py", "models/images/pixels.py"),
            **({} if params.precision == "no" else {"precision": params.precision}),
        }
        self.copies: dict[str, Pipeline] = {}  # by device; made once, and not for each block
        self.blocks = Blocks(workspace.scratch() / "prior", recipe)
        self.blocks.open()

    def images(self, prompt: str, count: int) -> np.ndarray:
        """Return the images of the first `count` seeds, uint8 [count, C, S, S]; draws those that are not known."""
        whole = -(-count // self.params.batch_size) * self.params.batch_size
        keys = [f"{prompt}/{self.params.seed + number}" for number in range(whole)]
        starts = range(0, whole, self.params.batch_size)
        todo = [start for start in starts if self.blocks.missing(keys[start : start + self.params.batch_size])]
        if todo:
            known = count - min(count, len(todo) * self.params.batch_size)
            print(f"prior: {count - known} images of {prompt!r} to draw, {known} known", flush=True)
        drawn = shared_in_turns(
            lambda device: functools.partial(self._draw, prompt, device), todo, self.pipeline.device
        )
        with progress(desc="prior: draw", total=len(todo), unit="block", delay=2) as bar:
            for start, pixels in zip(todo, drawn, strict=True):
                self.blocks.add(keys[start : start + self.params.batch_size], {"pixels": pixels})
                bar.update()
        if not count:
            return np.empty((0, self.pipeline.info.channels, *[self.pipeline.info.size] * 2), np.uint8)
        return self.blocks.take(keys[:count])["pixels"].numpy()

    def _draw(self, prompt: str, device: str, start: int) -> torch.Tensor:
        """Return the images of a block, uint8 [batch_size, C, S, S]."""
        if device not in self.copies:
            self.copies[device] = self.pipeline.on(device)
        first, size = self.params.seed + start, self.params.batch_size
        drawn = self.copies[device].sample(
            range(first, first + size), None, self.sampling, prompts=[prompt] * size, batch_size=size
        )
        return torch.from_numpy(to_uint8(drawn))
