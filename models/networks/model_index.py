"""The `model_index.json` of a saved model, from which diffusers loads it as one of its pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.json_files import JsonObject, read_json
from models.networks.controlnet import FOLDER
from models.networks.published import FLOW_SCHEDULER
from models.networks.transformer import TransformerConfig
from models.networks.unet import UNetConfig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from models.networks.dit import DiTConfig
    from models.networks.network import NetworkConfig
    from models.networks.text_dit import TextDiTConfig

DIT_PIPELINE_CLASSES = 1000
"""Number of classes for which diffusers' `DiTPipeline`, made for ImageNet, gives the right null class."""


def model_index(folder: Path, config: NetworkConfig, conditioning: str, classes: Sequence[str]) -> JsonObject | None:
    """Return what `DiffusionPipeline.from_pretrained` reads, for the models that diffusers has a pipeline for.

    These are unconditional models of pixels, text-conditional models of latents, and transformers of latents with the
    classes of ImageNet; others load by component.
    """
    unet, scheduler = ["diffusers", "UNet2DModel"], ["diffusers", "DDPMScheduler"]
    latent = (folder / "vae").is_dir()
    if read_json(folder / "scheduler" / "scheduler_config.json")["_class_name"] == FLOW_SCHEDULER:
        return None  # diffusers has no pipeline of these networks with this scheduler
    if isinstance(config, TransformerConfig):
        return _transformer_index(folder, config, conditioning, classes) if latent and config.in_diffusers else None
    if isinstance(config, UNetConfig) and config.patch_size > 1:
        return None  # diffusers' pipelines do not cut images into patches
    if conditioning == "none" and not latent:
        return {"_class_name": "DDPMPipeline", "unet": unet, "scheduler": scheduler}
    if conditioning != "text" or not latent:
        return None
    components = {
        **({"controlnet": ["diffusers", "ControlNetModel"]} if (controlled := (folder / FOLDER).is_dir()) else {}),
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": scheduler,
        "vae": ["diffusers", read_json(folder / "vae" / "config.json")["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if not (folder / "text_encoder_2").is_dir():
        unchecked = {"safety_checker": [None, None], "requires_safety_checker": False}
        name = "StableDiffusionControlNetPipeline" if controlled else "StableDiffusionPipeline"
        return {"_class_name": name, **components, **unchecked}
    second = {
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "force_zeros_for_empty_prompt": True,
    }
    name = "StableDiffusionXLControlNetPipeline" if controlled else "StableDiffusionXLPipeline"
    return {"_class_name": name, **components, **second}


def _transformer_index(
    folder: Path, config: DiTConfig | TextDiTConfig, conditioning: str, classes: Sequence[str]
) -> JsonObject | None:
    """Return the index of a transformer of latents.

    `DiTPipeline` knows one null class, 1000. `PixArtAlphaPipeline` encodes prompts with T5 and masks padding, so that
    it gets no text encoder here and takes `prompt_embeds` instead.
    """
    shared = {
        "transformer": ["diffusers", config.to_diffusers()["_class_name"]],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "vae": ["diffusers", read_json(folder / "vae" / "config.json")["_class_name"]],
    }
    if conditioning == "text":
        return {
            "_class_name": "PixArtAlphaPipeline",
            **shared,
            "text_encoder": [None, None],
            "tokenizer": [None, None],
        }
    if len(classes) != DIT_PIPELINE_CLASSES:
        return None
    names = {str(label): name for label, name in enumerate(classes)}
    return {"_class_name": "DiTPipeline", **shared, "id2label": names}
