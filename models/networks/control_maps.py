"""Control maps: what a ControlNet reads beside the prompt, made from images, and how well an image follows its map.

`canny`   edges of the grey image by OpenCV (Canny 1986), uint8 [N, 1, H, W], 0 or 255
`colour`  mean colour of each cell of a coarse grid, uint8 [N, 3, cells, cells]
`own`     maps that the user gives with the images, uint8 [N, 3, H, W]

Maps are stored in these shapes. `as_input` brings them to what the network reads: float32 [N, 3, H, W] in [0, 1].
Images are uint8 [N, C, H, W], C 1 (grey) or 3 (RGB).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from models.json_files import JsonObject

CHANNELS = 3
"""Of what the network reads; diffusers' pipelines convert control images to RGB."""
TOLERANCE = 0.0075
"""Share of the diagonal by which an edge may be displaced and still count as found, as in the benchmark of Martin et
al. (2004): 0 pixels at 16 x 16, 1 at 64 x 64, 5 at 512 x 512. With one pixel at 16 x 16 the F1 of two unlike digits
would be 0.82."""


@dataclass(frozen=True)
class ControlSpec:
    """The kind of a model's control maps and how they are made; part of `afterimage.json` and of the latents."""

    kind: str
    """"canny", "colour" or "own"."""
    canny_low: float = 100.0
    canny_high: float = 200.0
    """Thresholds of the gradient: edges begin above the higher one and go on above the lower one."""
    colour_cells: int = 8
    """Cells of the colour map along a side."""

    def to_json(self) -> JsonObject:
        """Return the specification as JSON values."""
        return asdict(self)

    @property
    def channels(self) -> int:
        """Channels of a stored map."""
        return 1 if self.kind == "canny" else 3


def maps_of(spec: ControlSpec, pixels: np.ndarray) -> np.ndarray:
    """Make the control maps of images, in the stored shape.

    Raises:
        ValueError: for the kind "own", whose maps are not made from images.
    """
    if spec.kind == "canny":
        return edges(pixels, spec.canny_low, spec.canny_high)
    if spec.kind == "colour":
        return _cells(pixels, spec.colour_cells)
    raise ValueError("this model reads control maps of your own, which are not made from an image; give the map itself")


def edges(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return the Canny edges of images, uint8 [N, 1, H, W], 255 on an edge and 0 elsewhere."""
    grey = (
        image[0] if len(image) == 1 else cv2.cvtColor(_channels_last(image), cv2.COLOR_RGB2GRAY) for image in pixels
    )
    return np.stack([cv2.Canny(np.ascontiguousarray(image), low, high)[None] for image in grey])


def _cells(pixels: np.ndarray, cells: int) -> np.ndarray:
    """Return the mean colour of each cell, uint8 [N, 3, cells, cells]."""
    small = [cv2.resize(_channels_last(image), (cells, cells), interpolation=cv2.INTER_AREA) for image in pixels]
    shaped = [image[None] if image.ndim == 2 else image.transpose(2, 0, 1) for image in small]
    return np.stack([np.broadcast_to(image, (3, cells, cells)) for image in shaped])


def _channels_last(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.transpose(1, 2, 0))


def as_input(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Convert stored maps, uint8 [N, 1 or 3, h, w], to float32 [N, 3, height, width] in [0, 1], see `resized`."""
    return resized(maps.float() / 255, height, width).expand(-1, CHANNELS, -1, -1)


def resized(values: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize maps, float32 [N, C, h, w], to [N, C, height, width].

    A coarser grid that fits a whole number of times keeps its cells; others are interpolated (bilinear, antialiased).
    """
    if values.shape[2:] == (height, width):
        return values
    if height % values.shape[2] == 0 == width % values.shape[3]:
        return F.interpolate(values, (height, width), mode="nearest")
    return F.interpolate(values, (height, width), mode="bilinear", antialias=True)


def given(maps: np.ndarray, count: int, side: int, spec: ControlSpec | None) -> np.ndarray:
    """Return the maps that a user gives for `count` images, uint8 [count, 1 or 3, side, side].

    maps: uint8 [count or 1, 1 or 3, h, w]. Maps of another resolution are resized with a warning; the coarse grid of a
    colour map has a resolution of its own.

    Raises:
        ValueError: for another shape, type or number of maps.
    """
    if maps.dtype != np.uint8 or maps.ndim != 4 or maps.shape[1] not in (1, CHANNELS) or len(maps) not in (1, count):
        raise ValueError(
            f"the control is {maps.dtype} {list(maps.shape)}; give uint8 [{count}, 1 or 3, {side}, {side}], one map "
            "for each image or one for all"
        )
    coarse = (spec.colour_cells,) * 2 if spec and spec.kind == "colour" else None
    if maps.shape[2:] not in ((side, side), coarse):
        warnings.warn(
            f"the control is {maps.shape[3]} x {maps.shape[2]} pixels and is resized to {side} x {side}, the "
            "resolution of the images",
            stacklevel=3,
        )
    if maps.shape[2:] != (side, side):
        maps = _at(maps, (count, CHANNELS, side, side))
    return np.broadcast_to(maps, (count, *maps.shape[1:]))


def agreement(spec: ControlSpec, maps: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Return how well each image follows its control map, float64 [N] in [0, 1].

    maps: stored maps of N images; pixels: uint8 [N, C, H, W]. For colours it is 1 minus the mean absolute difference of
    the cells, relative to 255. For edges it is their F1 within `TOLERANCE`; own maps are compared by the edges of both.
    """
    if spec.kind == "colour":
        difference = np.abs(maps.astype(np.float64) - _cells(pixels, spec.colour_cells))
        return 1 - difference.mean(axis=(1, 2, 3)) / 255
    drawn = edges(pixels, spec.canny_low, spec.canny_high)
    wanted = maps if spec.kind == "canny" else edges(_at(maps, pixels.shape), spec.canny_low, spec.canny_high)
    return np.array([edge_f1(*pair) for pair in zip(wanted[:, 0] > 0, drawn[:, 0] > 0, strict=True)])


def _at(maps: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return maps at the resolution of images of the given shape, uint8 [N, 1 or 3, H, W]."""
    return resized(torch.tensor(maps).float(), *shape[2:]).round().clamp(0, 255).to(torch.uint8).numpy()


def edge_f1(wanted: np.ndarray, drawn: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """Return the F1 of two edge maps, bool [H, W]: the harmonic mean of precision and recall.

    An edge pixel counts as matched if the other map has one within `tolerance` of the diagonal, rounded to whole pixels
    in both directions (Martin et al.
    2004, section 4.2, with a neighbourhood in place of the one-to-one assignment). Two maps without edges agree
    entirely, and one with edges does not agree with one without.
    """
    if not wanted.any() or not drawn.any():
        return float(wanted.any() == drawn.any())
    reach = round(tolerance * math.hypot(*wanted.shape))
    kernel = np.ones((2 * reach + 1,) * 2, np.uint8)
    precision, recall = (
        float(cv2.dilate(other.astype(np.uint8), kernel)[own].mean())
        for own, other in ((drawn, wanted), (wanted, drawn))
    )
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
