"""The autoencoder between images and latents: training, reconstruction quality, and normalisation of its latents.

It is the KL autoencoder of latent diffusion (Rombach et al. 2022, section 3.1) without discriminator and perceptual
loss; a loss on finite differences keeps edges sharp instead.

Legend: B images, C channels, S height and width; k latent channels, s height and width of a latent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from models.device import sent
from models.judges.classifier import to_input
from models.judges.fit import Pixels, Recipe, fit, seeded
from models.networks.autoencoder import APPLY_BATCH, encode

if TYPE_CHECKING:
    import numpy as np
    from diffusers import AutoencoderKL

    from models.networks.autoencoder import Autoencoder

LEARNING_RATE = 2e-3
NORM_GROUPS = 4
FIRST_LOG_VARIANCE = -6.0


@dataclass(frozen=True)
class AutoencoderConfig:
    """Architecture and loss weights."""

    channels: int
    """Channels of an image, 1 or 3."""
    latent_channels: int
    """Channels of a latent."""
    widths: tuple[int, ...]
    """Channels of each resolution, highest first; every level but the last halves the resolution."""
    layers_per_block: int
    """Residual blocks per resolution."""
    reconstruction: str = "l1"
    """Distance between an image and its reconstruction: "l1" or "l2"."""
    edge_weight: float = 0.5
    """Weight of the loss on finite differences."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence from the standard normal, nats summed over a latent, per value of its image."""


def build(config: AutoencoderConfig) -> AutoencoderKL:
    """Build an untrained network of scaling factor 1; `fold_scaling` moves the measured one into the weights."""
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
    # With the usual initial standard deviation of 1, noise dominates the latents for many steps.
    torch.nn.init.constant_(network.quant_conv.bias[config.latent_channels :], FIRST_LOG_VARIANCE)
    return network


def train_autoencoder(pixels: Pixels, config: AutoencoderConfig, recipe: Recipe) -> AutoencoderKL:
    """Train on uint8 images [N, C, S, S]; returns the network in evaluation mode. The result is reproducible."""
    network = seeded(lambda: build(config), recipe.seed).to(recipe.device)

    def loss(rows: np.ndarray, generator: torch.Generator) -> Tensor:
        images = to_input(pixels[rows])
        if recipe.flip:
            flipped = torch.rand((len(rows), 1, 1, 1), generator=generator) < 0.5
            images = torch.where(flipped, images.flip(3), images)
        images = sent(images, recipe.device)
        posterior = network.encode(images).latent_dist
        noise = sent(torch.randn(posterior.mean.shape, generator=generator), recipe.device)
        decoded = network.decode(posterior.mean + posterior.std * noise).sample
        kl: Tensor = config.kl_weight * posterior.kl().sum() / images.numel()
        return reconstruction_loss(decoded, images, config) + kl

    fit(network, loss, pixels.shape[0], replace(recipe, learning_rate=LEARNING_RATE))
    return network


def reconstruction_loss(decoded: Tensor, images: Tensor, config: AutoencoderConfig) -> Tensor:
    """Return the distance of reconstructions, float [B, C, S, S], to their images, plus that of finite differences."""
    distance = {"l1": F.l1_loss, "l2": F.mse_loss}[config.reconstruction]
    vertical, horizontal = (distance(decoded.diff(dim=axis), images.diff(dim=axis)) for axis in (2, 3))
    return distance(decoded, images) + config.edge_weight * (vertical + horizontal)


def quality(pixels: np.ndarray, reconstructed: np.ndarray) -> dict[str, float]:
    """Return the mean PSNR in dB and, for images of at least 11 x 11 pixels, the mean SSIM (Wang et al. 2004).

    pixels and reconstructed: uint8 [N, C, S, S].
    """
    errors, similar, large = [], [], min(pixels.shape[2:]) >= 11
    for start in range(0, len(pixels), APPLY_BATCH):  # SSIM of 512 large images at once needs 100 GB
        part = slice(start, start + APPLY_BATCH)
        first, second = (torch.from_numpy(images[part]).double() for images in (reconstructed, pixels))
        errors.append((second - first).square().mean(dim=(1, 2, 3)))
        if large:
            ssim = structural_similarity_index_measure(first, second, data_range=255.0, reduction="none")
            similar.append(ssim.flatten())
    decibels = 10 * torch.log10(255**2 / torch.cat(errors).clamp(min=1e-3))
    return {"psnr": float(decibels.mean())} | ({"ssim": float(torch.cat(similar).mean())} if large else {})


def measure_scaling(network: Autoencoder, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each latent channel over uint8 images [N, C, S, S], float64 [k] each.

    The standard deviation is that of sampled latents: it includes the posterior's own.
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
    """Change the weights in place so that the network encodes to and decodes from (z - mean) / std per channel.

    The layers next to the latents, `quant_conv` and `post_quant_conv`, are linear and 1 x 1, so this is exact. Every
    program that loads the network then gets normalised latents with scaling factor 1.

    Raises:
        ValueError: for a network without those layers.
    """
    if getattr(network, "quant_conv", None) is None or getattr(network, "post_quant_conv", None) is None:
        raise ValueError(
            f"{type(network).__name__} has no quant_conv and post_quant_conv; its latents cannot be scaled"
        )
    # `encode` has multiplied what was measured by the factor.
    factor = network.config.scaling_factor
    mean, std = (value.to(network.quant_conv.weight) / factor for value in (mean, std))
    half = len(mean)
    with torch.no_grad():
        before, after = network.quant_conv, network.post_quant_conv
        after.bias += after.weight[:, :, 0, 0] @ mean
        after.weight *= std[None, :, None, None]
        before.weight[:half] /= std[:, None, None, None]
        before.bias[:half] = (before.bias[:half] - mean) / std
        before.bias[half:] -= 2 * std.log()  # these channels are the logarithm of the variance
    network.register_to_config(scaling_factor=1.0)
