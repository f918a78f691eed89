"""How well a trained network denoises, timestep by timestep, on images it has not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from models import samplers
from models.pipeline import from_uint8

if TYPE_CHECKING:
    from models.pipeline import Pipeline


def error_by_timestep(
    pipeline: Pipeline,
    pixels: np.ndarray,
    wishes: Mapping[str, Sequence[Any]],
    timesteps: Sequence[int],
    seed: int,
    batch_size: int,
) -> list[float]:
    """Mean squared error of the predicted clean image, in [-1, 1], at each of `timesteps`.

    pixels: uint8 [N, C, S, S]. Each is noised by x_t = sqrt(a) x_0 + sqrt(1 - a) eps (Ho et al. 2020, eq. 4), the
    same eps at every timestep, from `seed` on; `wishes` are the `labels` or `prompts` [N] of a conditional model.
    """
    totals = np.zeros(len(timesteps))
    for start in range(0, len(pixels), batch_size):
        part = slice(start, start + batch_size)
        own = {name: values[part] for name, values in wishes.items()}
        totals += _errors(pipeline, pixels[part], own, timesteps, seed + start)
    return (totals / len(pixels)).tolist()


def _errors(
    pipeline: Pipeline, pixels: np.ndarray, wishes: Mapping[str, Any], timesteps: Sequence[int], seed: int
) -> np.ndarray:
    """The errors of one batch at each timestep, summed over its images, float64 [T]."""
    import torch

    images, clean = torch.from_numpy(from_uint8(pixels)).to(pipeline.device), pipeline.encode(pixels)
    noise = torch.from_numpy(samplers.SeededNoise(range(seed, seed + len(clean)), clean.shape[1:])()).to(clean.device)
    condition, null = pipeline.condition(wishes.get("labels"), wishes.get("prompts"))

    def predict(x: torch.Tensor, t: int, condition: torch.Tensor | None) -> torch.Tensor:
        return pipeline.unet(x, torch.full((len(x),), t, dtype=torch.int64, device=x.device), condition)

    clip = pipeline.autoencoder is None
    denoise = samplers.denoiser(predict, pipeline.prediction, pipeline.alpha_bar, condition, null, clip=clip)
    errors = []
    with torch.inference_mode():
        for t in timesteps:
            a = float(pipeline.alpha_bar[t])
            predicted = pipeline.decode(denoise(a**0.5 * clean + (1 - a) ** 0.5 * noise, t))
            errors.append(float((predicted - images).double().square().mean(dim=(1, 2, 3)).sum()))
    return np.asarray(errors)
