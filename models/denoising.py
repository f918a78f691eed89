"""How well a trained network denoises held-out images, timestep by timestep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from models.images.pixels import from_uint8
from models.noise.samplers import SeededNoise
from models.parallel import over_batches

if TYPE_CHECKING:
    from models.pipeline import Pipeline

Conditions: TypeAlias = Mapping[str, Sequence[Any]]  # integers for labels, strings for prompts
"""`labels` or `prompts` [N] of a conditional model; empty for an unconditional one."""


def error_by_timestep(
    pipeline: Pipeline,
    pixels: np.ndarray,
    conditions: Conditions,
    timesteps: Sequence[float],
    seed: int,
    batch_size: int,
) -> list[float]:
    """Return the mean squared error of the predicted clean image, values in [-1, 1], at each of `timesteps`.

    pixels: uint8 [N, C, S, S]. Each image is noised by x_t = alpha x_0 + sigma eps; eps is the same at every timestep,
    and that of image i has the seed `seed` + i.
    """

    def errors(part: slice) -> np.ndarray:
        batch = {name: values[part] for name, values in conditions.items()}
        return _errors(pipeline, pixels[part], batch, timesteps, seed + part.start)

    totals = np.sum(over_batches(errors, len(pixels), batch_size, pipeline.device), axis=0)
    return [float(error) for error in totals / len(pixels)]


def _errors(
    pipeline: Pipeline, pixels: np.ndarray, conditions: Conditions, timesteps: Sequence[float], seed: int
) -> np.ndarray:
    """Return the errors of one batch at each timestep, summed over its images, float64 [T]."""
    images, clean = torch.from_numpy(from_uint8(pixels)).to(pipeline.device), pipeline.encode(pixels)
    noise = torch.from_numpy(SeededNoise(range(seed, seed + len(clean)), clean.shape[1:])()).to(clean.device)
    denoise = pipeline.denoiser(conditions.get("labels"), conditions.get("prompts"))
    errors = []
    with torch.inference_mode():
        for t in timesteps:
            level = pipeline.path.level(t)
            predicted = pipeline.decode(denoise(level.alpha * clean + level.sigma * noise, level))
            errors.append((predicted - images).double().square().mean(dim=(1, 2, 3)).sum())
        return torch.stack(errors).cpu().numpy()  # read once, so that no timestep waits for the device
