"""Images to latents and back, with an autoencoder in diffusers' layout: reading, writing, encoding, decoding.

Legend: B images, C channels, S their side; k latent channels, s side of a latent.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = ("AutoencoderKL", "AutoencoderTiny")
APPLY_BATCH = 16


def encode(network: Any, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """uint8 images [B, C, S, S] -> mean and standard deviation of their latents, float32 [B, k, s, s] each.

    They are in the units in which a diffusion model sees them: times the network's scaling factor. An
    `AutoencoderTiny` knows no deviation: it is 0.
    """
    images = torch.from_numpy(np.ascontiguousarray(pixels)).to(network.device).float()
    with torch.inference_mode():
        encoded = network.encode(images.div(127.5).sub(1).to(network.dtype))
    factor = network.config.scaling_factor
    if hasattr(encoded, "latents"):
        mean = encoded.latents.float() * factor
        return mean, torch.zeros_like(mean)
    return encoded.latent_dist.mean.float() * factor, encoded.latent_dist.std.float() * factor


def decode(network: Any, latents: Tensor) -> Tensor:
    """Latents as a diffusion model sees them, float [B, k, s, s] -> images, float [B, C, S, S], about [-1, 1]."""
    with torch.inference_mode():
        scaled = (latents / network.config.scaling_factor).to(network.device, network.dtype)
        return network.decode(scaled).sample.to(latents.dtype)


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
