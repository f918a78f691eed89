"""Inception v3 as TensorFlow released it on 2015-12-05, the feature extractor of the published FID.

Szegedy et al. 2016, "Rethinking the Inception Architecture"; Heusel et al. 2017 for FID. It differs from the Inception
v3 of current libraries in its 1,008 classes, in average pooling that excludes the padding, and in the last block,
whose pooling branch takes the maximum. Weights have the names of the PyTorch file
`pt_inception-2015-12-05-6726825d.pth` (also published as `weights-inception-2015-12-05-6726825d.pth`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.judges.feature_widths import INCEPTION

FEATURES, CLASSES, SIDE = INCEPTION, 1008, 299
BATCH = 32


class Convolution(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(
        self, inward: int, outward: int, kernel: int | tuple[int, int] = 1, stride: int = 1, padding: int = -1
    ) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        reach = (sides[0] // 2, sides[1] // 2) if padding < 0 else (padding, padding)
        self.conv = nn.Conv2d(inward, outward, sides, stride, reach, bias=False)
        self.bn = nn.BatchNorm2d(outward, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """35 x 35: branches of 1x1, 5x5, two 3x3, and average pooling (Szegedy et al. 2016, figure 5)."""

    def __init__(self, inward: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(inward, 64)
        self.branch5x5_1, self.branch5x5_2 = Convolution(inward, 48), Convolution(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Convolution(inward, 64), Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3)
        self.branch_pool = Convolution(inward, pooled)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        parts = [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(_average(x))]
        return torch.cat(parts, 1)


class BlockB(nn.Module):
    """35 x 35 -> 17 x 17 (figure 10)."""

    def __init__(self, inward: int) -> None:
        super().__init__()
        self.branch3x3 = Convolution(inward, 384, 3, stride=2, padding=0)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Convolution(inward, 64), Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class BlockC(nn.Module):
    """17 x 17: 7x7 convolutions factorised into 1x7 and 7x1 (figure 6)."""

    def __init__(self, inward: int, width: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(inward, 192)
        self.branch7x7_1, self.branch7x7_2 = Convolution(inward, width), Convolution(width, width, (1, 7))
        self.branch7x7_3 = Convolution(width, 192, (7, 1))
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Convolution(inward, width), Convolution(width, width, (7, 1))
        self.branch7x7dbl_3, self.branch7x7dbl_4 = (Convolution(width, width, side) for side in ((1, 7), (7, 1)))
        self.branch7x7dbl_5 = Convolution(width, 192, (1, 7))
        self.branch_pool = Convolution(inward, 192)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], 1)


class BlockD(nn.Module):
    """17 x 17 -> 8 x 8."""

    def __init__(self, inward: int) -> None:
        super().__init__()
        self.branch3x3_1 = Convolution(inward, 192)
        self.branch3x3_2 = Convolution(192, 320, 3, stride=2, padding=0)
        self.branch7x7x3_1, self.branch7x7x3_2 = Convolution(inward, 192), Convolution(192, 192, (1, 7))
        self.branch7x7x3_3 = Convolution(192, 192, (7, 1))
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        long = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), long, F.max_pool2d(x, 3, 2)], 1)


class BlockE(nn.Module):
    """8 x 8: parallel 1x3 and 3x1 convolutions (figure 7); `largest` selects max pooling over average pooling."""

    def __init__(self, inward: int, largest: bool) -> None:
        super().__init__()
        self.largest = largest
        self.branch1x1 = Convolution(inward, 320)
        self.branch3x3_1 = Convolution(inward, 384)
        self.branch3x3_2a, self.branch3x3_2b = (Convolution(384, 384, side) for side in ((1, 3), (3, 1)))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Convolution(inward, 448), Convolution(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = (Convolution(384, 384, side) for side in ((1, 3), (3, 1)))
        self.branch_pool = Convolution(inward, 192)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.largest else _average(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(parts, 1)


class Inception(nn.Module):
    """Images, float [B, 3, 299, 299], about [-1, 1] -> features, float [B, 2048]; `fc` maps them to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, padding=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d = BlockC(768, 128), BlockC(768, 160), BlockC(768, 160)
        self.Mixed_6e, self.Mixed_7a = BlockC(768, 192), BlockD(768)
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, largest=False), BlockE(2048, largest=True)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean(dim=(2, 3))


def to_input(pixels: Tensor) -> Tensor:
    """Preprocess uint8 [N, 1 or 3, S, S] as the original graph does: float32 [N, 3, 299, 299], about [-1, 1].

    Bilinear interpolation without antialiasing, sample i at i S / 299, then (x - 128) / 128. Another resampling alone
    changes the FID by several points.
    """
    images = pixels.float().expand(-1, 3, -1, -1)
    for axis in (2, 3):
        images = _stretched(images, axis)
    return (images - 128) / 128


def _stretched(images: Tensor, axis: int) -> Tensor:
    """Interpolate linearly to `SIDE` samples along one axis."""
    side = images.shape[axis]
    position = torch.arange(SIDE, device=images.device, dtype=torch.float32) * (side / SIDE)
    low = position.long().clamp(max=side - 1)
    shape = [1] * images.ndim
    shape[axis] = SIDE
    weight = (position - low).view(shape)
    lower, upper = (images.index_select(axis, index) for index in (low, (low + 1).clamp(max=side - 1)))
    return lower + (upper - lower) * weight


@torch.inference_mode()
def extract(network: Inception, pixels: np.ndarray, device: str = "cpu") -> np.ndarray:
    """Extract features, float32 [N, 2048], from uint8 images [N, 1 or 3, S, S]."""
    features = []
    for start in range(0, len(pixels), BATCH):
        batch = torch.from_numpy(np.ascontiguousarray(pixels[start : start + BATCH])).to(device)
        features.append(network(to_input(batch)).cpu().numpy())
    return np.concatenate(features)
