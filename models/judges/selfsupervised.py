"""The judge's encoder for data without labels and captions: a small SimCLR (Chen et al. 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.device import sent
from models.judges.classifier import Backbone, apply_batch, to_input
from models.judges.fit import Pixels, Recipe, fit, seeded

if TYPE_CHECKING:
    import numpy as np

TEMPERATURE = 0.2
PROJECTION = 64
SMALLEST_CROP = 0.5
BRIGHTNESS, CONTRAST = 0.3, 0.3


class Encoder(nn.Module):
    """Images, float [B, channels, size, size] in [-1, 1] -> projections, float [B, `PROJECTION`].

    The judge uses the features of `backbone`; the projection head is for training only.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.backbone = Backbone(channels, size)
        width = self.backbone.features
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, PROJECTION))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def view(images: Tensor, generator: torch.Generator, flip: bool) -> Tensor:
    """Augment each image: a random square crop, resized back, with random brightness and contrast.

    images: float [B, C, H, W] in [-1, 1]. Returns the same shape, about the same range.
    """
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    scale = uniform(SMALLEST_CROP, 1.0)
    mirror = torch.where(uniform(0, 1) < (0.5 if flip else 0.0), -1.0, 1.0)
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1] = scale * mirror, scale
    affine[:, 0, 2], affine[:, 1, 2] = (1 - scale) * uniform(-1, 1), (1 - scale) * uniform(-1, 1)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    cropped = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    contrast, brightness = uniform(1 - CONTRAST, 1 + CONTRAST), uniform(-BRIGHTNESS, BRIGHTNESS)
    return cropped * contrast.view(-1, 1, 1, 1) + brightness.view(-1, 1, 1, 1)


def twin_loss(projections: Tensor) -> Tensor:
    """Return the NT-Xent loss (Chen et al. 2020, eq. 1), a scalar.

    projections: [2 B, D]; rows i and i + B are two views of one image.
    """
    count = len(projections) // 2
    unit = F.normalize(projections, dim=-1)
    similarity = (unit @ unit.T / TEMPERATURE).fill_diagonal_(float("-inf"))
    twins = torch.arange(2 * count, device=projections.device).roll(count)
    return F.cross_entropy(similarity, twins)


def train_encoder(pixels: Pixels, recipe: Recipe) -> Encoder:
    """Train on uint8 images [N, C, S, S]; returns the encoder in evaluation mode."""
    network = seeded(lambda: Encoder(pixels.shape[1], pixels.shape[2]), recipe.seed).to(recipe.device)

    def loss(rows: np.ndarray, generator: torch.Generator) -> Tensor:
        images = to_input(pixels[rows])
        views = torch.cat([view(images, generator, recipe.flip), view(images, generator, recipe.flip)])
        return twin_loss(network(sent(views, recipe.device)))

    fit(network, loss, pixels.shape[0], recipe)
    return network


@torch.inference_mode()
def twin_accuracy(network: Encoder, pixels: np.ndarray, seed: int, flip: bool = False, device: str = "cpu") -> float:
    """Return how often the nearest neighbour of an image's first random view is its second, among all N.

    pixels: uint8 [N, C, S, S].
    """
    generator = torch.Generator().manual_seed(seed)
    size = apply_batch(pixels)
    batches = [to_input(pixels[start : start + size]) for start in range(0, len(pixels), size)]
    first, second = (
        F.normalize(torch.cat([network(view(images, generator, flip).to(device)) for images in batches]), dim=-1)
        for _ in range(2)
    )
    return float(((first @ second.T).argmax(1).cpu() == torch.arange(len(pixels))).float().mean())
