"""The judge's classifier, a small residual network: images -> features -> class logits.

Also here: the backbone that the judge's other networks share, augmentation, and batched application.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.device import sent
from models.images.pixels import from_uint8
from models.judges.feature_widths import FIRST_WIDTH, MAX_RESOLUTION, stage_widths
from models.judges.fit import Pixels, Recipe, fit, seeded
from models.parallel import over_devices

LABEL_SMOOTHING = 0.1  # spreads the features more evenly, so that distances depend less on single images
APPLY_BATCH, APPLY_VALUES = 500, 1 << 24
"""Most images in one batch of `apply`, and most values in it."""


class Backbone(nn.Module):
    """Images, float [B, channels, size, size] in [-1, 1] -> non-negative features, float [B, features].

    The stride of the first convolution reduces larger images to `MAX_RESOLUTION`; each stage then halves the
    resolution, down to 4 or less, and doubles the width, up to `MAX_FEATURES`.
    """

    def __init__(self, channels: int, size: int, width: int = FIRST_WIDTH) -> None:
        super().__init__()
        widths = stage_widths(size, width)
        self.stem = _convolution(channels, width, stride=max(1, size // MAX_RESOLUTION))
        stages: list[nn.Module] = []
        for narrow, wide in itertools.pairwise(widths):
            stages += [nn.MaxPool2d(2), _convolution(narrow, wide), _Residual(wide)]
        self.stages = nn.Sequential(*stages)
        self.features = widths[-1]

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
    """Convert uint8 [N, C, H, W] to a float32 tensor of the same shape in [-1, 1]."""
    return from_uint8(torch.from_numpy(np.ascontiguousarray(pixels)).to(device))


def shift_and_flip(images: Tensor, generator: torch.Generator, flip: bool) -> Tensor:
    """Shift each image by up to a sixteenth of its side with replicated edges; with `flip`, flip half of them.

    images: float [B, C, S, S]. Returns the same shape.
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


def train_classifier(pixels: Pixels, labels: np.ndarray, classes: int, recipe: Recipe) -> Classifier:
    """Train on uint8 images [N, C, S, S] with int64 labels [N]; images of label -1 are ignored.

    Returns the network in evaluation mode.
    """
    network = seeded(lambda: Classifier(pixels.shape[1], pixels.shape[2], classes), recipe.seed).to(recipe.device)
    labelled = np.flatnonzero(labels >= 0)

    def loss(batch: np.ndarray, generator: torch.Generator) -> Tensor:
        rows = labelled[batch]
        images = sent(shift_and_flip(to_input(pixels[rows]), generator, recipe.flip), recipe.device)
        target = sent(torch.from_numpy(labels[rows]), recipe.device)
        return F.cross_entropy(network(images), target, label_smoothing=LABEL_SMOOTHING)

    fit(network, loss, len(labelled), recipe)
    return network


def apply(copy: Callable[[str], Callable[[Tensor], Tensor]], pixels: np.ndarray, device: str = "cpu") -> np.ndarray:
    """Apply a network in evaluation mode to uint8 images [N, C, H, W], N >= 1, in batches; returns float32 [N, D].

    `copy(name)` returns the network on one of the devices that `device` stands for, see `parallel.over_devices`; it
    receives float32 images in [-1, 1].
    """

    @torch.inference_mode()
    def applied(placed: tuple[str, Callable[[Tensor], Tensor]], part: slice) -> np.ndarray:
        name, function = placed
        return function(to_input(pixels[part], name)).float().cpu().numpy()

    batches = over_devices(applied, lambda name: (name, copy(name)), len(pixels), apply_batch(pixels), device)
    return np.concatenate(batches)


def apply_batch(pixels: np.ndarray) -> int:
    """Return the batch size of `apply` for images [N, C, H, W]; large images get smaller batches."""
    return max(1, min(APPLY_BATCH, APPLY_VALUES // math.prod(pixels.shape[1:])))
