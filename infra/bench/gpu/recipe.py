"""Network and training of the preset `cifar10_ddpm`, written out: composing a preset needs Hydra.

A test compares the values with the preset.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.flops import forward_flops
from models.networks.unet import UNet, UNetConfig
from models.noise.schedules import path_of

if TYPE_CHECKING:
    from models.noise.paths import Path

CIFAR = UNetConfig(
    size=32,
    channels=3,
    block_out_channels=(128, 256, 256, 256),
    attention=(False, True, False, False),
    layers_per_block=2,
    norm_num_groups=32,
    attention_head_dim=None,
    dropout=0.1,
)
"""35.7 M parameters."""
TINY = replace(CIFAR, size=8, block_out_channels=(4,), attention=(False,), layers_per_block=1, norm_num_groups=2)
PREDICTION, SCHEDULE, TIMESTEPS = "epsilon", "linear", 1000
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 2e-4, 0.0, 1.0
AVERAGES = ("decay-0.9999", "std-0.05", "std-0.10")
EMA_EVERY = 8
BATCH = 128
FLIP = True


def config_of(tiny: bool) -> UNetConfig:
    return TINY if tiny else CIFAR


def noise_path() -> Path:
    return path_of(SCHEDULE, TIMESTEPS)


def random_images(count: int, size: int, seed: int = 0) -> Tensor:
    """Draw smooth random images, uint8 [count, 3, size, size]: colour gradients, which a network learns quickly."""
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True)
    return (smooth.mul_(64).add_(127.5)).clamp_(0, 255).to(torch.uint8)


def training_flops(config: UNetConfig) -> float:
    """Return the operations of forward and backward pass for one image, counted on meta tensors."""
    with torch.device("meta"):
        network: nn.Module = UNet(config)
        image = torch.empty(1, config.channels, config.size, config.size)
        return 3 * forward_flops(network, image, torch.zeros(1, dtype=torch.int64))
