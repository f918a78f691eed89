"""The autoencoder of the codec: downloaded or trained, scaled, measured on held-out images, and saved."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models import autoencoder_training as training
from models.device import best_device
from models.images import pictures
from models.judges.fit import Recipe
from models.networks import autoencoder
from tasks.formats.codec_info import AutoencoderInfo
from tasks.pretrained import weights
from tasks.runtime.errors import StageError
from tasks.runtime.progress import progress

if TYPE_CHECKING:
    from models.networks.autoencoder import Autoencoder
    from tasks.params import AutoencoderParams, CodecParams
    from tasks.pictures.samples import Samples

SCALING_IMAGES = 1024
"""Training images over which the mean and standard deviation of the latents are measured."""
QUALITY_IMAGES = 512
"""Held-out images on which the reconstruction is measured."""
SHOWN_IMAGES, SHOWN_SIDE, MAX_SIDE = 10, 64, 256
"""Images in `reconstructions.png`, and the side in pixels to which small ones are enlarged and large ones reduced."""


def scaling_rows(count: int) -> np.ndarray:
    """Return the training images, of `count`, over which the latents are measured, int64 [at most 1024].

    They are evenly spaced, so that a data set sorted by class is measured over all classes.
    """
    return np.arange(0, count, max(1, count // SCALING_IMAGES))[:SCALING_IMAGES]


def make_autoencoder(
    train: Samples, held_out: Samples, folder: Path, params: CodecParams, picture: str
) -> tuple[AutoencoderInfo, dict[str, float]]:
    """Write `vae/` and the file `picture` with reconstructions to `folder`.

    Returns:
        The description for `codec.json`, and the measurements on held-out images by name.

    Raises:
        StageError: if published weights do not fit the parameters.
    """
    network = _train(train, params) if params.autoencoder.weights is None else _download(params.autoencoder)
    _require_fits(network, train, params.autoencoder)
    subset = train.at(scaling_rows(len(train.keys)))
    mean, std = training.measure_scaling(network, subset)
    if params.autoencoder.scaling == "measured":
        try:
            training.fold_scaling(network, mean, std)
        except ValueError as error:
            raise StageError(f"{error}; set codec.autoencoder.scaling to 'published'") from None
    images = held_out.at(np.arange(min(QUALITY_IMAGES, len(held_out.keys))))
    reconstructed = autoencoder.reconstruct(network, images)
    quality = {f"autoencoder_{name}": rounded(value) for name, value in training.quality(images, reconstructed).items()}
    _save_comparison(images, reconstructed, folder / picture)
    info = AutoencoderInfo(
        sha256=autoencoder.save_autoencoder(folder / "vae", network),
        channels=network.config.latent_channels,
        size=held_out.pixels.shape[-1] // autoencoder.downscale_factor(network),
        scaling=params.autoencoder.scaling,
        measured_mean=[rounded(value) for value in mean.tolist()],
        measured_std=[rounded(value) for value in std.tolist()],
    )
    return info, quality


def _train(train: Samples, params: CodecParams) -> Autoencoder:
    section = params.autoencoder
    config = training.AutoencoderConfig(
        channels=train.pixels.shape[1],
        latent_channels=section.latent_channels,
        widths=section.widths,
        layers_per_block=section.layers_per_block,
        reconstruction=section.reconstruction,
        edge_weight=section.edge_weight,
        kl_weight=section.kl_weight,
    )
    return training.train_autoencoder(train.by_row, config, replace(recipe(params), device=best_device()))


def recipe(params: CodecParams) -> Recipe:
    """Return how the autoencoder is trained, on the CPU."""
    section = params.autoencoder
    bar = partial(progress, desc="codec: autoencoder", unit="step")
    return Recipe(section.steps, section.batch_size, params.seed, section.horizontal_flip, progress=bar)


def _download(params: AutoencoderParams) -> Autoencoder:
    assert params.weights is not None and params.pin is not None, "checked when the parameters are loaded"
    folder = weights.part(weights.local_folder(params.weights, params.pin, ("vae",)), "vae")
    try:
        return autoencoder.load_autoencoder(folder, best_device())
    except (OSError, ValueError) as error:
        raise StageError(f"codec.autoencoder.weights '{params.weights}': {error}") from None


def _require_fits(network: Autoencoder, train: Samples, params: AutoencoderParams) -> None:
    """Require the latents that the parameters describe, because the section `model` was checked against them."""
    config, key = network.config, "codec.autoencoder.weights"
    if config.in_channels != train.pixels.shape[1]:
        raise StageError(f"{key} are for {config.in_channels} image channels; set image.channels to that number")
    if config.latent_channels != params.latent_channels:
        raise StageError(f"{key} make {config.latent_channels} latent channels; set codec.autoencoder.latent_channels")
    downscale = autoencoder.downscale_factor(network)
    if downscale != 2 ** (len(params.widths) - 1):
        raise StageError(
            f"{key} reduce height and width by a factor of {downscale}, and codec.autoencoder.widths by "
            f"{2 ** (len(params.widths) - 1)}; set it to the widths of the weights"
        )
    if getattr(config, "latents_mean", None) is not None:
        raise StageError(
            f"{key} normalise their latents by a latents_mean as well as a scaling factor, and other programs would "
            "apply it again to latents made here; choose other weights"
        )


def _save_comparison(images: np.ndarray, reconstructed: np.ndarray, path: Path) -> None:
    count = min(SHOWN_IMAGES, len(images))
    pairs = pictures.shrunk(np.concatenate([images[:count], reconstructed[:count]]), MAX_SIDE)
    scale = max(1, round(SHOWN_SIDE / pairs.shape[-1]))
    pictures.save_png(pictures.grid(pairs, count, scale, ["image", "decoded"]), path)


def rounded(value: float) -> float:
    """Round to six significant digits; further digits depend on the order of summation."""
    return float(f"{value:.6g}")
