"""Training the autoencoder between images and latents, measuring what it loses, and normalising its latents.

It is the KL autoencoder of latent diffusion (Rombach et al. 2022, section 3.1) without adversary and without a
perceptual network: what keeps edges sharp is a loss on finite differences.

Legend: B images, C channels, S their side; k latent channels, s side of a latent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.judges.classifier import to_input
from models.judges.fit import Recipe, fit, seeded
from models.networks.autoencoder import APPLY_BATCH, encode

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

LEARNING_RATE = 2e-3
NORM_GROUPS = 4
FIRST_LOG_VARIANCE = -6.0


@dataclass(frozen=True)
class AutoencoderConfig:
    """`widths` has one entry per resolution, highest first; every one but the last halves it."""

    channels: int
    latent_channels: int
    widths: tuple[int, ...]
    layers_per_block: int
    reconstruction: str = "l1"
    """ "l1" or "l2": the distance between an image and its reconstruction."""
    edge_weight: float = 0.5
    kl_weight: float = 1e-6
    """Of the divergence from a standard normal in nats, summed over a latent, per number of its image."""


def build(config: AutoencoderConfig) -> AutoencoderKL:
    """An untrained network, its scaling factor 1: what is measured later is folded into its weights."""
    from diffusers import AutoencoderKL

    levels = len(config.widths)
    network = AutoencoderKL(
        in_channels=config.channels,
        out_channels=config.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.widths,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=NORM_GROUPS,
        scaling_factor=1.0,
    )
    # With the posterior's usual first deviation of 1 the noise drowns for long what the decoder could learn from.
    torch.nn.init.constant_(network.quant_conv.bias[config.latent_channels :], FIRST_LOG_VARIANCE)
    return network


def train_autoencoder(pixels: np.ndarray, config: AutoencoderConfig, recipe: Recipe) -> AutoencoderKL:
    """Train on uint8 images [N, C, S, S]; the same recipe gives the same weights. Returns it in evaluation mode."""
    network = seeded(lambda: build(config), recipe.seed).to(recipe.device)

    def loss(rows: np.ndarray, generator: torch.Generator) -> Tensor:
        images = to_input(pixels[rows])
        if recipe.flip:
            mirrored = torch.rand((len(rows), 1, 1, 1), generator=generator) < 0.5
            images = torch.where(mirrored, images.flip(3), images)
        posterior = network.encode(images.to(recipe.device)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(recipe.device)
        drawn = network.decode(posterior.mean + posterior.std * noise).sample
        return reconstruction_loss(drawn, images.to(recipe.device), config) + (
            config.kl_weight * posterior.kl().sum() / images.numel()
        )

    fit(network, loss, len(pixels), replace(recipe, learning_rate=LEARNING_RATE))
    return network


def reconstruction_loss(drawn: Tensor, images: Tensor, config: AutoencoderConfig) -> Tensor:
    """Mean distance of reconstructions, float [B, C, S, S], to their images, and that of their edges."""
    distance = {"l1": F.l1_loss, "l2": F.mse_loss}[config.reconstruction]
    across, down = (distance(drawn.diff(dim=axis), images.diff(dim=axis)) for axis in (2, 3))
    return distance(drawn, images) + config.edge_weight * (across + down)


def quality(pixels: np.ndarray, reconstructed: np.ndarray) -> dict[str, float]:
    """Mean over images of PSNR in dB, and SSIM (Wang et al. 2004) where images have at least 11 pixels a side.

    Both uint8 [N, C, S, S].
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    errors, similar, large = [], [], min(pixels.shape[2:]) >= 11
    for start in range(0, len(pixels), APPLY_BATCH):  # of 512 large images at once it would take 100 GB
        part = slice(start, start + APPLY_BATCH)
        first, second = (torch.from_numpy(images[part]).double() for images in (reconstructed, pixels))
        errors.append((second - first).square().mean(dim=(1, 2, 3)))
        if large:
            alike = structural_similarity_index_measure(first, second, data_range=255.0, reduction="none")
            similar.append(alike.flatten())
    decibels = 10 * torch.log10(255**2 / torch.cat(errors).clamp(min=1e-3))
    return {"psnr": float(decibels.mean())} | ({"ssim": float(torch.cat(similar).mean())} if large else {})


def measure_scaling(network: Any, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every latent channel over images uint8 [N, C, S, S]: float64 [k] each.

    The deviation is that of drawn latents: of their means, and of the posterior around them.
    """
    means, deviations = [], []
    for start in range(0, len(pixels), APPLY_BATCH):
        mean, std = encode(network, pixels[start : start + APPLY_BATCH])
        means.append(mean.double().cpu())
        deviations.append(std.double().cpu())
    mean, std = torch.cat(means), torch.cat(deviations)
    variance = mean.var(dim=(0, 2, 3), correction=0) + std.square().mean(dim=(0, 2, 3))
    return mean.mean(dim=(0, 2, 3)), variance.sqrt()


def fold_scaling(network: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Change weights so that latents z come out as (z - mean) / std, channel by channel, and go in like that.

    The layers next to the latents are linear and 1 x 1, so this is exact, and every program that knows the network
    sees normalised latents with scaling factor 1. Raises `ValueError` for a network without those layers.
    """
    if getattr(network, "quant_conv", None) is None or getattr(network, "post_quant_conv", None) is None:
        raise ValueError(f"{type(network).__name__} has no linear layer around its latents")
    # `encode` multiplied by the factor before anything was measured.
    factor = network.config.scaling_factor
    mean, std = (value.to(network.quant_conv.weight) / factor for value in (mean, std))
    half = len(mean)
    with torch.no_grad():
        entry, way_out = network.quant_conv, network.post_quant_conv
        way_out.bias += way_out.weight[:, :, 0, 0] @ mean
        way_out.weight *= std[None, :, None, None]
        entry.weight[:half] /= std[:, None, None, None]
        entry.bias[:half] = (entry.bias[:half] - mean) / std
        entry.bias[half:] -= 2 * std.log()  # the logarithm of the variance
    network.register_to_config(scaling_factor=1.0)
