"""Masks for inpainting: making them, bringing them to latent resolution, and compositing images with them.

A mask is bool [H, W] or [N, H, W]; true is painted anew. Imports only NumPy, because the ONNX bundle contains a copy of
this file.
"""

from __future__ import annotations

import itertools

import numpy as np

from .images.pixels import from_uint8

FEATHER = 2
"""Width in pixels of the seam inside the mask, by default."""
STRENGTH = 0.8
"""Strength of image-to-image where none is given, as in diffusers."""
STROKES = 3
STROKE_POINTS = 3


def rectangle(height: int, width: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
    """Return the mask of the rectangle left <= x < right, top <= y < bottom, bool [height, width].

    Raises:
        ValueError: if it is empty or leaves the image.
    """
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(
            f"rectangle {left},{top},{right},{bottom} (left, top, right, bottom) is empty or leaves an image of "
            f"{width} x {height} pixels"
        )
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


def centre(height: int, width: int) -> np.ndarray:
    """Return the mask of the middle rectangle of half the height and half the width, bool [height, width]."""
    return rectangle(height, width, width // 4, height // 4, width - width // 4, height - height // 4)


def half(height: int, width: int) -> np.ndarray:
    """Return the mask of the right half, bool [height, width]."""
    return rectangle(height, width, width // 2, 0, width, height)


def strokes(height: int, width: int, seed: int) -> np.ndarray:
    """Return the mask of random brush strokes, bool [height, width] (Yu et al. 2019, section 3.4, simplified).

    Each of `STROKES` is a line through `STROKE_POINTS` random points, with a random width about a tenth of the image.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    pixels = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1) + 0.5
    mask = np.zeros((height, width), bool)
    for _ in range(STROKES):
        points = rng.uniform(0, (height, width), (STROKE_POINTS, 2))
        radius = max(rng.uniform(0.03, 0.07) * min(height, width), 0.75)
        for a, b in itertools.pairwise(points):
            along = ((pixels - a) @ (b - a) / max((b - a) @ (b - a), 1e-9)).clip(0, 1)
            mask |= np.linalg.norm(pixels - a - along[..., None] * (b - a), axis=-1) <= radius
    return mask


def default_strength(mask: np.ndarray | None) -> float:
    """Return the strength where none is given: 1 with a mask, `STRENGTH` without."""
    return STRENGTH if mask is None else 1.0


def require_images(images: np.ndarray, wanted: tuple[int, int, int, int]) -> None:
    """Check that images are uint8 of the shape `wanted`, [N, C, H, W].

    Raises:
        ValueError: if they are not.
    """
    if images.dtype != np.uint8 or images.shape != wanted:
        raise ValueError(
            f"the given images are {images.dtype} {list(images.shape)}, and this model and {wanted[0]} seeds need "
            f"uint8 {list(wanted)}; resize them"
        )


def for_images(mask: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Return the mask of each image, bool [N, H, W]; a mask [H, W] is that of all.

    Raises:
        ValueError: for another dtype than bool, or a mask of another size or number than the images.
    """
    count, (height, width) = len(images), images.shape[-2:]
    if mask.dtype != np.bool_:
        raise ValueError(f"the mask has the dtype {mask.dtype}; give booleans, true where the image is painted anew")
    if mask.shape[-2:] != (height, width):
        given = " x ".join(str(side) for side in mask.shape[-2:][::-1])
        raise ValueError(f"the mask is {given} pixels and the image {width} x {height}; give a mask of the same size")
    if mask.ndim not in (2, 3) or (mask.ndim == 3 and len(mask) != count):
        raise ValueError(f"the mask has the shape {mask.shape} for {count} images; give one for all or one for each")
    return np.broadcast_to(mask, (count, height, width))


def at_resolution(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Convert bool [N, H, W] to the network's input resolution, float32 [N, 1, height, width] of 0 and 1.

    A latent is painted anew if any of its pixels is, so that no latent that is kept contains pixels under the mask.
    diffusers takes the top left pixel of each latent; both agree for masks aligned to latents.
    """
    count, rows, columns = mask.shape
    cells = mask.reshape(count, 1, height, rows // height, width, columns // width)
    return cells.max(axis=(3, 5)).astype(np.float32)


def composite(pixels: np.ndarray, drawn: np.ndarray, mask: np.ndarray, feather: int = FEATHER) -> np.ndarray:
    """Put the drawn images into the given ones: float32 [N, C, H, W], outside the mask exactly the given pixels.

    An autoencoder shifts colours, which would show as a seam. So the difference between given and drawn image at the
    edge of the mask is carried `feather` pixels into it and fades out linearly: a short-range version of seamless
    cloning (Pérez et al. 2003). Given pixels under the mask have no influence.

    Args:
        pixels: the given images, uint8 [N, C, H, W].
        drawn: float [N, C, H, W], about [-1, 1].
        mask: bool [N, H, W].
        feather: width of the seam, pixels; 0 does not blend.
    """
    given, kept = from_uint8(pixels), ~mask[:, None]
    offset, reached = np.where(kept, given - drawn, 0), kept.astype(np.float32)
    correction = np.zeros_like(given)
    for distance in range(1, feather + 1):
        neighbours = _neighbourhood(reached)
        ring = (reached == 0) & (neighbours > 0)
        offset = np.where(ring, _neighbourhood(offset) / np.maximum(neighbours, 1), offset)
        correction = np.where(ring, offset * (1 - distance / (feather + 1)), correction)
        reached = np.where(ring, 1, reached)
    return np.where(kept, given, drawn + correction).astype(np.float32)


def _neighbourhood(values: np.ndarray) -> np.ndarray:
    """Return the sum over each pixel's 3 x 3 neighbourhood, of the same shape [N, C, H, W]."""
    height, width = values.shape[-2:]
    padded = np.pad(values, ((0, 0), (0, 0), (1, 1), (1, 1)))
    return sum((padded[..., y : y + height, x : x + width] for y in range(3) for x in range(3)), np.zeros_like(values))
