"""Encoded image files -> pixels at the resolution of their bucket -> latents.

Stored latents are keyed by the image's content and by the code of this file and of all that it imports.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from models.networks import autoencoder
from tasks.pictures import decoding

if TYPE_CHECKING:
    from tasks.formats.buckets import Resolution

BATCH = 16
"""Images per batch of the autoencoder on a CPU; fixed, because its rounding depends on the shape of a batch."""

Encoded: TypeAlias = "tuple[str, bytes, int]"
"""SHA-256, bytes and number of pixels of an image file."""


@dataclass(frozen=True)
class Chunk:
    """Image files of one bucket."""

    resolution: Resolution
    images: list[Encoded]

    def __len__(self) -> int:
        return len(self.images)


def decode_chunk(chunk: Chunk, channels: int) -> np.ndarray:
    """Decode, resize and crop image files to uint8 [n, channels, *chunk.resolution]."""
    return np.stack(
        [decoding.decode_resized(data, pixels, chunk.resolution, channels) for _, data, pixels in chunk.images]
    )


def encode_pixels(
    network: autoencoder.Autoencoder,
    pixels: np.ndarray,
    mirrored: bool,
    precision: str = "no",
    at_once: int | None = None,
) -> dict[str, torch.Tensor]:
    """Encode uint8 pixels [n, C, H, W] to `mean` and `std`, bfloat16 [n, V, c, h, w]; V is 2 if `mirrored`, else 1.

    The last batch is padded, so an image's latent depends neither on its neighbours nor on their number. `precision` is
    that of `autoencoder.encode`, and `at_once` the size of a batch on a GPU; None is that of a CPU.
    """
    views = [pixels, pixels[..., ::-1]] if mirrored else [pixels]
    size = at_once or BATCH
    means, deviations = [], []
    for view in views:
        padded = np.concatenate([view, np.repeat(view[-1:], -len(view) % size, axis=0)])
        batches = [padded[start : start + size] for start in range(0, len(padded), size)]
        parts = [autoencoder.encode(network, batch, precision, at_once) for batch in batches]
        mean, std = (torch.cat(tensors)[: len(view)].to(torch.bfloat16).cpu() for tensors in zip(*parts, strict=True))
        means.append(mean)
        deviations.append(std)
    return {"mean": torch.stack(means, dim=1), "std": torch.stack(deviations, dim=1)}
