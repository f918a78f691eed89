"""A small residual network: images -> features -> class logits. It measures; it never draws."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.judges.fit import Recipe, fit, seeded

MAX_FEATURES = 128
MAX_RESOLUTION = 32
# Features spread less unevenly than without, so distances depend less on single images.
LABEL_SMOOTHING = 0.1
APPLY_BATCH, APPLY_VALUES = 500, 1 << 24
"""Images that are looked at together, at most, and the numbers that they consist of."""


class Backbone(nn.Module):
    """Images, float [B, channels, size, size] in [-1, 1] -> features, float [B, features], not negative.

    The first convolution brings images above `MAX_RESOLUTION` down to it; then each stage halves the resolution,
    until it is at most 4, and doubles the width, up to `MAX_FEATURES`.
    """

    def __init__(self, channels: int, size: int, width: int = 16) -> None:
        super().__init__()
        stride = max(1, size // MAX_RESOLUTION)
        self.stem = _convolution(channels, width, stride)
        size //= stride
        stages: list[nn.Module] = []
        while size > 4:
            wider = min(2 * width, MAX_FEATURES)
            stages += [nn.MaxPool2d(2), _convolution(width, wider), _Residual(wider)]
            size, width = size // 2, wider
        self.stages = nn.Sequential(*stages)
        self.features = width

    def forward(self, images: Tensor) -> Tensor:
        return self.stages(self.stem(images)).mean(dim=(2, 3))


class Classifier(nn.Module):
    """Images, float [B, channels, size, size] in [-1, 1] -> logits, float [B, classes]."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.backbone = Backbone(channels, size)
        self.head = nn.Linear(self.backbone.features, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


class _Residual(nn.Module):
    """x + f(x) with two convolutions (He et al. 2015, figure 2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_convolution(width, width), _convolution(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _convolution(inward: int, outward: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inward, outward, stride + 2, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outward), nn.ReLU())


def to_input(pixels: np.ndarray, device: str = "cpu") -> Tensor:
    """uint8 [N, C, H, W] -> float32 tensor of the same shape in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).to(device).float().div(127.5).sub(1)


def shift_and_flip(images: Tensor, generator: torch.Generator, flip: bool) -> Tensor:
    """Move each image by up to a sixteenth of its side, repeating the edge; with `flip`, mirror half of them.

    images: float [B, C, H, W]; returns the same shape.
    """
    count, _, side, _ = images.shape
    reach = max(1, side // 16)
    offset = torch.randint(0, 2 * reach + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand((count, 1), generator=generator) < (0.5 if flip else 0.0)
    line = torch.arange(side)
    rows = line + offset[0]
    columns = torch.where(mirrored, line.flip(0), line) + offset[1]
    padded = F.pad(images, (reach,) * 4, mode="replicate").permute(0, 2, 3, 1)
    batch = torch.arange(count)[:, None, None]
    return padded[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def train_classifier(pixels: np.ndarray, labels: np.ndarray, classes: int, recipe: Recipe) -> Classifier:
    """Train on those of uint8 images [N, C, S, S] whose int64 labels [N] are in [0, classes) and not -1.

    Returns it in evaluation mode.
    """
    network = seeded(lambda: Classifier(pixels.shape[1], pixels.shape[2], classes), recipe.seed).to(recipe.device)

    labelled = np.flatnonzero(labels >= 0)

    def loss(some: np.ndarray, generator: torch.Generator) -> Tensor:
        rows = labelled[some]
        images = shift_and_flip(to_input(pixels[rows]), generator, recipe.flip).to(recipe.device)
        wanted = torch.from_numpy(labels[rows]).to(recipe.device)
        return F.cross_entropy(network(images), wanted, label_smoothing=LABEL_SMOOTHING)

    fit(network, loss, len(labelled), recipe)
    return network


@torch.inference_mode()
def apply(function: Callable[[Tensor], Tensor], pixels: np.ndarray, device: str = "cpu") -> np.ndarray:
    """`function` of images in [-1, 1] (a network in evaluation mode), batch by batch over uint8 images
    [N, C, H, W], N >= 1. Returns float32 [N, D]."""
    size = apply_batch(pixels)
    return np.concatenate(
        [
            function(to_input(pixels[start : start + size], device)).float().cpu().numpy()
            for start in range(0, len(pixels), size)
        ]
    )


def apply_batch(pixels: np.ndarray) -> int:
    """How many of the images [N, C, H, W] are looked at together: fewer of large ones."""
    return max(1, min(APPLY_BATCH, APPLY_VALUES // math.prod(pixels.shape[1:])))
