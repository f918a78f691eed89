"""Image-to-image and inpainting with a trained pipeline: uint8 images and a mask -> edited images.

`models/noise/editing.py` has the mathematics, `models/masks.py` what concerns masks; here they meet the autoencoder and
inpainting U-Nets, whose input contains the mask and the masked image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from models import masks
from models.images.pixels import from_uint8
from models.noise.editing import Start, require_strength, steps_of
from models.noise.samplers import DEFAULT_SAMPLING, Sampling

if TYPE_CHECKING:
    from models.noise.samplers import Callback
    from models.pipeline import Pipeline

GREY = 127
"""What replaces the masked pixels in the input of an inpainting U-Net: uint8 closest to 0 in [-1, 1]."""


def edit(
    pipeline: Pipeline,
    seeds: Sequence[int],
    images: np.ndarray,
    strength: float,
    mask: np.ndarray | None = None,
    *,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    resampling: int = 1,
    jump: int = 1,
    feather: int = masks.FEATHER,
    batch_size: int = 256,
    callback: Callback | None = None,
) -> np.ndarray:
    """Draw images from given ones, float32 [N, C, H, W], about [-1, 1].

    Image i depends on images[i], seeds[i], mask and condition alone. Without a mask this is image-to-image. With one,
    only the masked region is painted anew; the others pixels are exactly the given ones. An empty mask gives the image
    back; a full mask at strength 1 and without resampling draws what `pipeline.sample` does.

    Args:
        pipeline: the model.
        seeds: one for each image.
        images: uint8 [N, C, S, S].
        strength: share of the sampling steps that are taken, in (0, 1]; see `Start`.
        mask: bool [N, S, S], or [S, S] for all images; true is painted anew.
        labels: one for each image, for a class-conditional model.
        prompts: one for each image, for a text-conditional model.
        sampling: sampler, steps and guidance.
        resampling: how often RePaint takes each step; 1 for no repetition, and for inpainting U-Nets.
        jump: number of steps that a repetition goes back.
        feather: width of the blended seam inside the mask, pixels.
        batch_size: images drawn at once.
        callback: called after each step as in `Pipeline.sample`.

    Raises:
        ValueError: for images or a mask that do not fit the model or each other, a strength outside (0, 1] or without
            any step, and whatever `Pipeline.sample` refuses.
    """
    info = pipeline.info
    masks.require_images(images, (len(seeds), info.channels, info.size, info.size))
    require_strength(strength)  # before anything is encoded
    steps_of(strength, sampling.steps)
    chosen = None if mask is None else masks.for_images(mask, images)
    if chosen is not None and not chosen.any():
        return from_uint8(images)
    given, context = begin(pipeline, images, strength, chosen, resampling, jump)
    drawn = pipeline.sample(
        seeds,
        labels,
        sampling,
        prompts=prompts,
        batch_size=batch_size,
        callback=callback,
        start=given,
        context=context,
    )
    return drawn if chosen is None else masks.composite(images, drawn, chosen, feather)


def begin(
    pipeline: Pipeline,
    images: np.ndarray,
    strength: float,
    mask: np.ndarray | None = None,
    resampling: int = 1,
    jump: int = 1,
) -> tuple[Start | None, torch.Tensor | None]:
    """Convert images and mask to what `Pipeline.sample` takes as `start` and `context`.

    An inpainting U-Net has learned to keep what is outside the mask, so nothing is replaced while it samples. At
    strength 1 it begins at pure noise, which has no `Start`.

    Args:
        pipeline: the model.
        images: uint8 [N, C, S, S].
        strength: in (0, 1].
        mask: bool [N, S, S]; None paints everything anew.
        resampling: see `Start`.
        jump: see `Start`.

    Raises:
        ValueError: for resampling with an inpainting U-Net or without a mask.
    """
    x0, (_, height, width) = pipeline.encode(images), pipeline.info.input_shape
    if not pipeline.context_channels:
        at_input = None if mask is None else torch.from_numpy(masks.at_resolution(mask, height, width)).to(x0.device)
        return Start(x0, strength, at_input, resampling, jump), None
    if resampling > 1:
        raise ValueError(f"resampling {resampling} is not for an inpainting U-Net, which replaces nothing; use 1")
    whole = np.ones((len(images), *images.shape[-2:]), bool) if mask is None else mask
    masked = pipeline.encode(np.where(whole[:, None], np.uint8(GREY), images))
    at_input = torch.from_numpy(masks.at_resolution(whole, height, width)).to(x0.device)
    pure = strength == 1 and mask is not None
    return None if pure else Start(x0, strength), torch.cat([at_input, masked], dim=1)
