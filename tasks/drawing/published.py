"""Published text-to-image models in diffusers' layout, such as Stable Diffusion 1.5 and XL, opened for drawing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from models.hashing import file_sha256
from models.json_files import read_json
from models.networks import autoencoder as autoencoders
from models.networks import controlnet, published
from models.networks.network import config_of, load_network
from models.networks.text_encoder import load_text_encoder
from models.networks.text_unet import TextUNetConfig
from models.pipeline import INFO, Pipeline, PipelineInfo

if TYPE_CHECKING:
    from pathlib import Path

RGB = 3


def is_published_text_to_image(folder: Path) -> bool:
    """Whether the folder holds a text-conditional U-Net of latents without the description of this project."""
    parts = (folder / "unet" / "config.json", folder / "vae", folder / "text_encoder")
    return not (folder / INFO).exists() and all(part.exists() for part in parts)


def open_published(folder: Path, device: str) -> Pipeline:
    """Open a published text-to-image model.

    The noise schedule and prediction type are those of its scheduler; the noise levels are spaced from pure noise on
    ("trailing"), as for models trained here. The SHA-256 of the U-Net takes the place of the training key.

    Raises:
        ValueError: for an architecture or schedule that is not supported, or weights of another network.
    """
    network_folder, scheduler_folder = published.parts(folder)
    config = config_of(read_json(network_folder / "config.json"))
    if not isinstance(config, TextUNetConfig):
        raise ValueError(f"{network_folder} is not a UNet2DConditionModel")
    scheduler = published.read_diffusion(read_json(scheduler_folder / "scheduler_config.json"))
    network = load_network(config, published.read_weights(network_folder), network_folder, device)
    autoencoder = autoencoders.load_autoencoder(folder / "vae", device)
    own = folder / controlnet.FOLDER
    control = controlnet.load(own, config).to(device) if own.is_dir() else None
    info = PipelineInfo(
        conditioning="text",
        channels=RGB,
        size=config.size * autoencoders.downscale_factor(autoencoder),
        schedule=scheduler.schedule,
        timesteps=scheduler.config.path.timesteps,
        prediction=scheduler.config.prediction_type,
        train_key=file_sha256(network_folder / published.WEIGHTS),
        classes=[],
        latent=(config.channels, config.size),
    )
    return Pipeline(
        network,
        replace(scheduler.config, clip_sample=False),
        info,
        device,
        autoencoder,
        load_text_encoder(folder, device),
        control=control,
    )
