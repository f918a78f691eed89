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
"""Most pixels that pass through the autoencoder at once, unless the caller says how many images."""
ENCODE_MAPS, DECODE_MAPS = 8, 10
"""Feature maps of full resolution and of the first width that encoding and decoding hold at a time, at most: 5 and 6
float32 maps, and room for the workspace of convolutions."""
MEMORY_SHARE = 0.4
MOST_AT_ONCE = 256
"""Limits of `images_at_once`: the share of a device's memory, and a number of images."""


def encode(
    network: Autoencoder, pixels: np.ndarray, precision: str = "no", at_once: int | None = None
) -> tuple[Tensor, Tensor]:
    """Encode uint8 images [B, C, S, S] to the mean and standard deviation of their latents, float32 [B, k, s, s] each.

    Both are multiplied by the autoencoder's scaling factor, as the diffusion model sees them. An `AutoencoderTiny` has
    no standard deviation; it is 0.

    Args:
        network: the autoencoder.
        pixels: the images.
        precision: "no" is float32; "bf16" computes convolutions and matrix products in bfloat16, whose range is that of
            float32, so that also the autoencoder of SDXL stays finite, which float16 overflows.
        at_once: images that pass through the network at once; None takes at most `CHUNK_PIXELS`.
    """
    factor, parts = network.config.scaling_factor, []
    size = at_once or max(1, CHUNK_PIXELS // (pixels.shape[-1] * pixels.shape[-2]))
    for chunk in _chunks(pixels, size):
        images = from_uint8(torch.from_numpy(np.ascontiguousarray(chunk)).to(network.device))
        with torch.inference_mode(), _autocast(network, precision):
            encoded = network.encode(images.to(network.dtype))
        if hasattr(encoded, "latents"):
            mean = encoded.latents.float() * factor
            parts.append((mean, torch.zeros_like(mean)))
        else:
            posterior = encoded.latent_dist
            parts.append((posterior.mean.float() * factor, posterior.std.float() * factor))
    means, deviations = zip(*parts, strict=True)
    return _joined(means), _joined(deviations)


def decode(network: Autoencoder, latents: Tensor, precision: str = "no", memory: int | None = None) -> Tensor:
    """Decode scaled latents, float [B, k, s, s], to images of the same dtype [B, C, S, S], about [-1, 1].

    Args:
        network: the autoencoder.
        latents: the latents.
        precision: that of `encode`; another one than "bf16" is float32, because float16 overflows.
        memory: bytes of the device, by which as many images are decoded at once as `images_at_once` returns; None
            takes at most `CHUNK_PIXELS`.
    """
    pixels = downscale_factor(network) ** 2 * latents.shape[-1] * latents.shape[-2]
    size = max(1, CHUNK_PIXELS // pixels) if memory is None else images_at_once(network, pixels, memory, DECODE_MAPS)
    with torch.inference_mode(), _autocast(network, precision):
        scaled = (latents / network.config.scaling_factor).to(network.device, network.dtype)
        return _joined([network.decode(chunk).sample.to(latents.dtype) for chunk in _chunks(scaled, size)])


def _autocast(network: Autoencoder, precision: str) -> torch.autocast:
    return torch.autocast(network.device.type, torch.bfloat16, enabled=precision == "bf16")


def downscale_factor(network: Autoencoder) -> int:
    """Return S / s, diffusers' `vae_scale_factor`."""
    widths = getattr(network.config, "block_out_channels", None) or network.config.encoder_block_out_channels
    return int(2 ** (len(widths) - 1))


def images_at_once(network: Autoencoder, pixels: int, memory: int, maps: int = ENCODE_MAPS) -> int:
    """Return how many images of `pixels` pixels each a device of `memory` bytes encodes at once: a power of two.

    The estimate of `maps` feature maps in float32 (`DECODE_MAPS` for decoding) may fill `MEMORY_SHARE` of the memory.
    It depends on the size of the device and not on what is free, so that the same machine computes the same batches
    again.
    """
    widths = getattr(network.config, "block_out_channels", None) or network.config.encoder_block_out_channels
    needed = maps * widths[0] * torch.float32.itemsize * pixels
    fitting = max(1, min(MOST_AT_ONCE, int(MEMORY_SHARE * memory) // needed))
    return 1 << (fitting.bit_length() - 1)


def _chunks(batch: Rows, size: int) -> list[Rows]:
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
