"""The base of DreamBooth: the weights that training starts from, as a pipeline with the networks of the codec."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from models.hashing import file_sha256
from models.json_files import read_json
from models.networks import published
from models.networks.autoencoder import load_autoencoder
from models.networks.network import config_of, load_network
from models.networks.text_encoder import SUFFIXES, load_text_encoder
from models.pipeline import Pipeline, PipelineInfo
from tasks.formats.codec_info import FILE as CODEC_FILE
from tasks.params import NO_PATH
from tasks.pretrained import weights
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from models.json_files import JsonObject
    from tasks.formats.codec_info import CodecInfo
    from tasks.params import BaseWeights

FOLDERS = {"unet": "unet", "dit": "transformer"}
SHARED = ("vae", *(f"text_encoder{suffix}" for suffix in SUFFIXES))
"""Networks that a pipeline folder contains beside its own, and that must be those of the codec."""


def load(codec: Path, info: CodecInfo, base: BaseWeights, device: str) -> tuple[Pipeline, JsonObject]:
    """Load the base; returns it with its identity: what the images that it draws depend on.

    Raises:
        StageError: if the base is missing, not a pipeline, or made with another codec.
    """
    name, folder = _folder(base)
    try:
        network_folder, scheduler_folder = published.parts(folder)
        config = config_of(read_json(network_folder / "config.json"))
        scheduler = published.read_diffusion(read_json(scheduler_folder / "scheduler_config.json"))
        network = load_network(config, published.read_weights(network_folder), network_folder, device)
    except KeyError as error:
        raise StageError(f"{name} cannot draw class images: its config.json lacks {error}; choose another") from None
    except (FileNotFoundError, ValueError) as error:
        raise StageError(f"{name} cannot draw class images: {error}; choose another") from None
    _require_codec(name, folder, codec)
    latent = info.autoencoder
    description = PipelineInfo(
        conditioning=info.conditioning,
        channels=info.channels,
        size=info.size,
        schedule=scheduler.schedule,
        timesteps=scheduler.config.path.timesteps,
        prediction=scheduler.config.prediction_type,
        train_key="",
        classes=[],
        latent=[latent.channels, latent.size] if latent else None,
    )
    clip = latent is None and scheduler.betas is not None
    pipeline = Pipeline(
        network,
        replace(scheduler.config, clip_sample=clip),
        description,
        device,
        load_autoencoder(codec / "vae", device) if latent else None,
        load_text_encoder(codec, device),
    )
    files = {"network": network_folder / published.WEIGHTS, "scheduler": scheduler_folder / "scheduler_config.json"}
    identity: JsonObject = {key: file_sha256(file) for key, file in files.items()}
    return pipeline, {**identity, "codec": file_sha256(codec / CODEC_FILE)}


def _folder(base: BaseWeights) -> tuple[str, Path]:
    """Return the parameter that names the base, with its value, and the folder, downloaded if it is published."""
    if base.weights is not None and base.pin is not None:
        parts = (FOLDERS[base.architecture], "scheduler")
        return f"train.weights {base.weights}", weights.local_folder(base.weights, base.pin, parts)
    assert base.init_from != NO_PATH, "checked when the parameters are loaded"
    return f"train.init_from {base.init_from}", Path(base.init_from)


def _require_codec(name: str, folder: Path, codec: Path) -> None:
    """Raise `StageError` if the pipeline in `folder` has another autoencoder or text encoder than the codec."""
    for part in SHARED:
        ours, theirs = (sorted((root / part).glob("*.safetensors")) for root in (codec, folder))
        if ours and theirs and file_sha256(ours[0]) != file_sha256(theirs[0]):
            raise StageError(
                f"{name} was trained with another {part} than {codec} holds; train the base on the same data with the "
                "same section codec, or name the base in codec.autoencoder.weights and codec.text.weights"
            )
