"""Images to latents and back with an autoencoder in diffusers' layout: reading, writing, encoding, decoding.

diffusers is imported where it is used, because models of pixels load this file and not it (4 s).

Legend: B images, C channels, S height and width; k latent channels, s height and width of a latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from models.hashing import folder_sha256
from models.images.pixels import from_uint8, to_uint8
from models.json_files import read_json, write_json

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny

Autoencoder: TypeAlias = "AutoencoderKL | AutoencoderTiny"
Rows = TypeVar("Rows", "np.ndarray", "Tensor")

KINDS = ("AutoencoderKL", "AutoencoderTiny")
APPLY_BATCH = 16
CHUNK_PIXELS = 8 * 512 * 512
"""Most pixels that pass through the autoencoder at once, whatever the batch size of the caller."""


def encode(network: Autoencoder, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Encode uint8 images [B, C, S, S] to the mean and standard deviation of their latents, float32 [B, k, s, s] each.

    Both are multiplied by the autoencoder's scaling factor, as the diffusion model sees them. An `AutoencoderTiny` has
    no standard deviation; it is 0.
    """
    factor, parts = network.config.scaling_factor, []
    for chunk in _chunks(pixels, pixels.shape[-1] * pixels.shape[-2]):
        images = from_uint8(torch.from_numpy(np.ascontiguousarray(chunk)).to(network.device))
        with torch.inference_mode():
            encoded = network.encode(images.to(network.dtype))
        if hasattr(encoded, "latents"):
            mean = encoded.latents.float() * factor
            parts.append((mean, torch.zeros_like(mean)))
        else:
            posterior = encoded.latent_dist
            parts.append((posterior.mean.float() * factor, posterior.std.float() * factor))
    means, deviations = zip(*parts, strict=True)
    return _joined(means), _joined(deviations)


def decode(network: Autoencoder, latents: Tensor) -> Tensor:
    """Decode scaled latents, float [B, k, s, s], to images of the same dtype [B, C, S, S], about [-1, 1]."""
    with torch.inference_mode():
        scaled = (latents / network.config.scaling_factor).to(network.device, network.dtype)
        pixels = downscale_factor(network) ** 2 * latents.shape[-1] * latents.shape[-2]
        return _joined([network.decode(chunk).sample.to(latents.dtype) for chunk in _chunks(scaled, pixels)])


def downscale_factor(network: Autoencoder) -> int:
    """Return S / s, diffusers' `vae_scale_factor`."""
    widths = getattr(network.config, "block_out_channels", None) or network.config.encoder_block_out_channels
    return int(2 ** (len(widths) - 1))


def _chunks(batch: Rows, pixels: int) -> list[Rows]:
    """Split a batch whose images have `pixels` pixels each into chunks of at most `CHUNK_PIXELS`."""
    size = max(1, CHUNK_PIXELS // pixels)
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def reconstruct(network: Autoencoder, pixels: np.ndarray) -> np.ndarray:
    """Encode uint8 images [N, C, S, S] to the mean of their latents and decode it; returns uint8 of the same shape."""
    parts = []
    for start in range(0, len(pixels), APPLY_BATCH):
        decoded = decode(network, encode(network, pixels[start : start + APPLY_BATCH])[0])
        parts.append(to_uint8(decoded).cpu().numpy())
    return np.concatenate(parts)


def save_autoencoder(folder: Path, network: Autoencoder) -> str:
    """Write the autoencoder in diffusers' layout into `folder`; returns the sha256 of the files."""
    network.save_pretrained(folder, safe_serialization=True)
    return seal(folder)


def seal(folder: Path) -> str:
    """Remove the local path from a network's `config.json`; returns the SHA-256 of the folder.

    The hash covers names and contents.
    """
    file = folder / "config.json"
    if file.exists():
        config = read_json(file)
        config.pop("_name_or_path", None)
        write_json(file, config)
    return folder_sha256(folder)


def load_autoencoder(folder: Path, device: str = "cpu") -> Autoencoder:
    """Load an `AutoencoderKL` or `AutoencoderTiny` in evaluation mode, float32, from safetensors.

    Raises:
        ValueError: for another kind of network.
        FileNotFoundError: if there is none.
    """
    import diffusers

    kind = read_json(folder / "config.json").get("_class_name")
    if kind not in KINDS:
        raise ValueError(f"{folder} holds a {kind}; give an {' or '.join(KINDS)}")
    network = getattr(diffusers, kind).from_pretrained(folder, use_safetensors=True, torch_dtype=torch.float32)
    return network.eval().requires_grad_(False).to(device)
