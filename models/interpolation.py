"""Images between two others: between their noises, and between their labels or prompts.

Deterministic samplers map noise to images smoothly, so that a path between two noises is a path between two images
(Song et al. 2021, section 5.3). Conditions are interpolated as embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from models import parallel
from models.networks.precision import predictor
from models.noise import samplers

if TYPE_CHECKING:
    from models.networks.network import Network
    from models.noise.samplers import Sampling
    from models.pipeline import Pipeline


def slerp(first: np.ndarray, second: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """Interpolate spherically (Shoemake 1985, section 3.3): sin((1 - w) a) / sin(a) first + sin(w a) / sin(a) second.

    a is the angle between the two arrays, taken as vectors. The straight line between two Gaussian noises leads through
    values of too small a norm, for which the network was not trained; this arc keeps the norm.

    float [...], and shares w [K] in 0..1 -> float [K, ...]. Parallel arrays are interpolated linearly.
    """
    cosine = np.vdot(first, second) / (np.linalg.norm(first) * np.linalg.norm(second))
    angle = np.arccos(np.clip(cosine, -1, 1))
    if np.sin(angle) < 1e-6:
        weights = [(1 - w, w) for w in shares]
    else:
        weights = [(np.sin((1 - w) * angle) / np.sin(angle), np.sin(w * angle) / np.sin(angle)) for w in shares]
    return np.stack([(a * first + b * second).astype(first.dtype) for a, b in weights])


@dataclass(frozen=True)
class Pair:
    """Two samples to interpolate between."""

    seeds: tuple[int, int]
    labels: tuple[int, int] | None
    """None for an unconditional model."""


def between_noises(
    model: Pipeline, pairs: Sequence[Pair], shares: Sequence[float], sampling: Sampling, batch_size: int
) -> np.ndarray:
    """Draw images float32 [R, K, C, H, W] on the arc between the two noises of each pair, for the pair's first label.

    `shares` [K] in 0..1; the images at 0 and 1 are those of `Pipeline.sample` for the two seeds.
    """
    noise = []
    for pair in pairs:
        first, second = (samplers.SeededNoise([seed], model.info.input_shape)()[0] for seed in pair.seeds)
        noise.append(slerp(first, second, shares))
    labels = [pair.labels[0] for pair in pairs if pair.labels is not None for _ in shares]
    condition, null = model.condition(labels or None)
    drawn = _drawn(model, np.concatenate(noise), _repeated(pairs, shares), (condition, null), sampling, batch_size)
    return drawn.reshape(len(pairs), len(shares), *drawn.shape[1:])


def between_conditions(
    model: Pipeline, pairs: Sequence[Pair], shares: Sequence[float], sampling: Sampling, batch_size: int
) -> np.ndarray:
    """Draw images float32 [R, K, C, H, W] from the first noise of each pair, with conditions between its two labels.

    For a text-conditional model these are the labels' prompts. Embeddings are interpolated linearly; `shares` [K] are
    those of the second label.

    Raises:
        ValueError: for an unconditional model.
    """
    seeds = _repeated(pairs, shares)
    labels = [pair.labels for pair in pairs if pair.labels is not None]
    ends, null = model.condition([label for both in labels for label in both] or None)
    if ends is None or null is None:
        raise ValueError("an unconditional model has no conditions to interpolate")
    null = null[:1].expand(len(seeds), *null.shape[1:])
    noise = np.stack([samplers.SeededNoise([seed], model.info.input_shape)()[0] for seed in seeds])
    if model.text is not None:
        mixed = torch.cat([_mixed(both, shares) for both in ends.split(2)])
        drawn = _drawn(model, noise, seeds, (mixed, null), sampling, batch_size)
    else:
        networks = [model.network, *([model.companions["guide"]] if "guide" in model.companions else [])]
        with ExitStack() as stack:
            rows = [stack.enter_context(_more_labels(network, labels, shares)) for network in networks]
            drawn = _drawn(model, noise, seeds, (rows[0].to(ends.device), null), sampling, batch_size)
    return drawn.reshape(len(pairs), len(shares), *drawn.shape[1:])


def _repeated(pairs: Sequence[Pair], shares: Sequence[float]) -> list[int]:
    """Return the first seed of each pair, once for each share."""
    return [pair.seeds[0] for pair in pairs for _ in shares]


def _mixed(ends: torch.Tensor, shares: Sequence[float]) -> torch.Tensor:
    """Interpolate linearly between the two rows of `ends`, [2, ...] -> [K, ...]."""
    w = torch.tensor(shares, dtype=ends.dtype, device=ends.device).view(-1, *[1] * (ends.dim() - 1))
    return (1 - w) * ends[:1] + w * ends[1:]


@contextmanager
def _more_labels(
    network: Network, labels: Sequence[tuple[int, int]], shares: Sequence[float]
) -> Iterator[torch.Tensor]:
    """Append interpolated rows to the class embedding within the block; yields their indices, int64 [R K]."""
    (embedding,) = (module for module in network.modules() if isinstance(module, nn.Embedding))
    trained = embedding.weight
    mixed = torch.cat([_mixed(trained[list(both)], shares) for both in labels])
    embedding.weight = nn.Parameter(torch.cat([trained, mixed]), requires_grad=False)
    try:
        yield torch.arange(len(trained), len(trained) + len(mixed))
    finally:
        embedding.weight = trained


def _drawn(
    model: Pipeline,
    noise: np.ndarray,
    seeds: Sequence[int],
    conditions: tuple[torch.Tensor | None, torch.Tensor | None],
    sampling: Sampling,
    batch_size: int,
) -> np.ndarray:
    """Draw one image from each noise; the further noise of a stochastic sampler depends on its seed alone."""
    predict = predictor(model.network, None, None, model.precision)
    weaker = model.companions.get("guide")
    guide = None if weaker is None else predictor(weaker, None, None, model.precision)

    def draw(part: slice) -> np.ndarray:
        condition, null = (None if each is None else each[part] for each in conditions)
        denoise = samplers.denoiser(predict, model.scheduler, sampling, condition, null, guide)
        later = samplers.SeededNoise(seeds[part], noise.shape[1:])
        later()  # the first noise of a seed is where sampling starts
        first = iter([noise[part]])

        def following() -> np.ndarray:
            values = next(first, None)
            return later() if values is None else values

        ahead = model.device != "cpu" and sampling.adds_noise
        with torch.inference_mode(), parallel.NoiseAhead(following, model.device, ahead) as drawn:
            images = model.decode(samplers.sample(denoise, drawn, model.scheduler, sampling))
        return images.float().cpu().numpy()

    return np.concatenate(parallel.over_batches(draw, len(noise), batch_size, model.device))
