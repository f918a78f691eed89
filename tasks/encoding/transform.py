"""Encoded pictures -> pixels in the form of their bucket -> latents.

`encode` keeps latents by the content of the picture and by the code of this file and of what it imports.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from tasks.pictures import decoding

if TYPE_CHECKING:
    import numpy as np
    import torch

    from tasks.formats.buckets import Form

BATCH = 16
"""Images that the autoencoder sees at once, always: its sums depend on the shape of a batch."""

Encoded: TypeAlias = "tuple[str, bytes, int]"
"""sha256, bytes and number of pixels of a picture."""


@dataclass(frozen=True)
class Chunk:
    """Pictures that become one form."""

    form: Form
    pictures: list[Encoded]

    def __len__(self) -> int:
        return len(self.pictures)


def decode_chunk(chunk: Chunk, channels: int) -> np.ndarray:
    """Encoded pictures -> uint8 [n, channels, *chunk.form]."""
    import numpy as np

    return np.stack([decoding.ingested(data, pixels, chunk.form, channels) for _, data, pixels in chunk.pictures])


def encode_pixels(network: Any, pixels: np.ndarray, mirrored: bool) -> dict[str, torch.Tensor]:
    """uint8 [n, C, H, W] -> `mean` and `std` bfloat16 [n, V, k, h, w], V = 2 with mirror images, else 1.

    Every batch has the same shape, so that an image's latent depends neither on its neighbours nor on how many.
    """
    import numpy as np
    import torch

    from models.networks import autoencoder

    views = [pixels, pixels[..., ::-1]] if mirrored else [pixels]
    means, deviations = [], []
    for view in views:
        whole = np.concatenate([view, np.repeat(view[-1:], -len(view) % BATCH, axis=0)])
        parts = [autoencoder.encode(network, whole[start : start + BATCH]) for start in range(0, len(whole), BATCH)]
        mean, std = (torch.cat(tensors)[: len(view)].to(torch.bfloat16).cpu() for tensors in zip(*parts, strict=True))
        means.append(mean)
        deviations.append(std)
    return {"mean": torch.stack(means, dim=1), "std": torch.stack(deviations, dim=1)}
