"""Images to latents and back, with an autoencoder in diffusers' layout: reading, writing, encoding, decoding.

Legend: B images, C channels, S their side; k latent channels, s side of a latent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = ("AutoencoderKL", "AutoencoderTiny")
APPLY_BATCH = 16
PART_PIXELS = 8 * 512 * 512
"""Of the images that pass the network together: of large ones few, whatever the batch of what works on latents."""


def encode(network: Any, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """uint8 images [B, C, S, S] -> mean and standard deviation of their latents, float32 [B, k, s, s] each.

    They are in the units in which a diffusion model sees them: times the network's scaling factor. An
    `AutoencoderTiny` knows no deviation: it is 0.
    """
    factor, parts = network.config.scaling_factor, []
    for some in _parts(pixels, pixels.shape[-1] * pixels.shape[-2]):
        images = torch.from_numpy(np.ascontiguousarray(some)).to(network.device).float()
        with torch.inference_mode():
            encoded = network.encode(images.div(127.5).sub(1).to(network.dtype))
        if hasattr(encoded, "latents"):
            mean = encoded.latents.float() * factor
            parts.append((mean, torch.zeros_like(mean)))
        else:
            posterior = encoded.latent_dist
            parts.append((posterior.mean.float() * factor, posterior.std.float() * factor))
    means, deviations = zip(*parts, strict=True)
    return _joined(means), _joined(deviations)


def decode(network: Any, latents: Tensor) -> Tensor:
    """Latents as a diffusion model sees them, float [B, k, s, s] -> images, float [B, C, S, S], about [-1, 1]."""
    with torch.inference_mode():
        scaled = (latents / network.config.scaling_factor).to(network.device, network.dtype)
        pixels = shrinking(network) ** 2 * latents.shape[-1] * latents.shape[-2]
        return _joined([network.decode(some).sample.to(latents.dtype) for some in _parts(scaled, pixels)])


def shrinking(network: Any) -> int:
    """How many times smaller than the side of an image that of its latent is."""
    widths = getattr(network.config, "block_out_channels", None) or network.config.encoder_block_out_channels
    return 2 ** (len(widths) - 1)


def _parts(batch: Any, pixels: int) -> list[Any]:
    """A batch, of which each image has so many `pixels`, in parts of `PART_PIXELS` at most."""
    size = max(1, PART_PIXELS // pixels)
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def reconstruct(network: Any, pixels: np.ndarray) -> np.ndarray:
    """uint8 images [N, C, S, S] -> the same after encoding (the mean) and decoding, uint8."""
    parts = []
    for start in range(0, len(pixels), APPLY_BATCH):
        drawn = decode(network, encode(network, pixels[start : start + APPLY_BATCH])[0])
        parts.append(drawn.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy())
    return np.concatenate(parts)


def save_autoencoder(folder: Path, network: Any) -> str:
    """Write diffusers' layout into `folder`; returns the sha256 of what was written."""
    network.save_pretrained(folder, safe_serialization=True)
    return seal(folder)


def seal(folder: Path) -> str:
    """Take the path a network was loaded from out of its `config.json`; returns the sha256 of the folder's files."""
    file = folder / "config.json"
    if file.exists():
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        whole.update(path.name.encode("utf-8") + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def load_autoencoder(folder: Path, device: str = "cpu") -> Any:
    """Read diffusers' layout: an `AutoencoderKL` or `AutoencoderTiny` in evaluation mode, float32.

    Weights come from safetensors alone. Raises `ValueError` for another kind of network, `FileNotFoundError`
    where there is none.
    """
    import diffusers

    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    if kind not in KINDS:
        raise ValueError(f"{folder} holds a {kind}; give an {' or '.join(KINDS)}")
    network = getattr(diffusers, kind).from_pretrained(folder, use_safetensors=True, torch_dtype=torch.float32)
    return network.eval().requires_grad_(False).to(device)
