"""Conversion between stored images (uint8, 0 to 255) and network values (float, -1 to 1), on NumPy and torch.

Imports only NumPy at run time, because the ONNX bundle contains a copy of this file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

Images = TypeVar("Images", "np.ndarray", "torch.Tensor")
"""A NumPy array or a torch tensor of any shape."""


def to_uint8(images: Images) -> Images:
    """Convert float values in [-1, 1] to uint8, rounding to nearest and clipping values outside the range."""
    levels = ((images + 1) * 127.5).round().clip(0, 255)
    return levels.astype(np.uint8) if isinstance(levels, np.ndarray) else levels.byte()


def from_uint8(pixels: Images) -> Images:
    """Convert uint8 to float32 in [-1, 1]; the inverse of `to_uint8` up to rounding."""
    values = pixels.astype(np.float32) if isinstance(pixels, np.ndarray) else pixels.float()
    return values / 127.5 - 1
