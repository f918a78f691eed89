"""Tiny networks of every kind, text encoders, autoencoders and pipelines, with random weights on the CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from models.networks.controlnet import ControlledUNet
from models.networks.dit import DiTConfig
from models.networks.network import build
from models.networks.text_dit import TextDiTConfig
from models.networks.text_encoder import PairedEncoder, ProjectedEncoder, TextEncoder
from models.networks.text_unet import TextUNetConfig
from models.networks.unet import UNetConfig
from models.noise.paths import RectifiedFlow
from models.noise.samplers import SchedulerConfig
from models.noise.schedules import path_of
from models.pipeline import Pipeline, PipelineInfo

SIZE, CLASSES = 8, ["hot dog", "dog", "cat"]
SHAPE = {"size": SIZE, "channels": 1}
UNET = {"block_out_channels": (8, 16), "attention": (False, True), "layers_per_block": 1, "norm_num_groups": 4}
DIT = {"patch_size": 2, "width": 16, "depth": 1, "heads": 2}
NETWORKS = {
    "unet": UNetConfig(**SHAPE, **UNET, attention_head_dim=8, conditions=4),
    "text_unet": TextUNetConfig(**SHAPE, **UNET, attention_head_dim=8, cross_attention_dim=16),
    "sdxl": TextUNetConfig(**SHAPE, **UNET, attention_head_dim=8, cross_attention_dim=24, pooled=8),
    "inpainting": TextUNetConfig(**SHAPE, **UNET, attention_head_dim=8, cross_attention_dim=16, context_channels=2),
    "control": TextUNetConfig(**SHAPE, **UNET, attention_head_dim=8, cross_attention_dim=16, control_widths=(4, 8)),
    "dit": DiTConfig(**SHAPE, **DIT, conditions=4, rope=True, qk_norm=True),
    "text_dit": TextDiTConfig(**SHAPE, **DIT, text_width=16),
}
"""A tiny network of each kind."""


class Tokenizer:
    """Two tokens of each caption."""

    model_max_length = 2

    def __call__(self, captions: list[str], **_: object) -> dict[str, np.ndarray]:
        return {"input_ids": np.array([[len(caption) % 10, 1] for caption in captions])}


def encoder(width: int) -> TextEncoder:
    """Make a text encoder with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return TextEncoder(CLIPTextModel(_text_config(CLIPTextConfig, width)).eval(), Tokenizer())


def both_encoders() -> PairedEncoder:
    """Make the two encoders of Stable Diffusion XL with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    second = CLIPTextModelWithProjection(_text_config(CLIPTextConfig, 8)).eval()
    return PairedEncoder(encoder(16), ProjectedEncoder(second, Tokenizer()))


def _text_config(kind: type, width: int):
    return kind(
        vocab_size=10,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2,
        projection_dim=8,
    )


def autoencoder():
    """Make an autoencoder of two latent channels with random weights."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    widths = {"block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 1}
    return AutoencoderKL(in_channels=1, out_channels=1, **blocks, **widths).eval().requires_grad_(False)


def made(kind: str, flow: bool = False, latent: bool = False) -> Pipeline:
    """Make a pipeline with random weights, on the CPU."""
    config = NETWORKS[kind]
    text = kind not in ("unet", "dit")
    network = build(config).eval().requires_grad_(False)
    control = network.control if isinstance(network, ControlledUNet) else None
    if control is not None:
        network = build(replace(config, control_widths=None)).eval().requires_grad_(False)
    scheduler = (RectifiedFlow(1000), "flow_prediction") if flow else (path_of("cosine", 20), "v_prediction")
    return Pipeline(
        network,
        SchedulerConfig(*scheduler),
        PipelineInfo(
            conditioning="text" if text else "label",
            channels=1,
            size=2 * SIZE if latent else SIZE,
            schedule="cosine",
            timesteps=20,
            prediction="v_prediction",
            train_key="",
            classes=CLASSES,
            null_label=None if text else 3,
            prompts=CLASSES if text else None,
            latent=(1, SIZE) if latent else None,
        ),
        autoencoder=autoencoder() if latent else None,
        text=(both_encoders() if kind == "sdxl" else encoder(16)) if text else None,
        companions={} if text else {"guide": build(config).eval().requires_grad_(False)},
        control=control,
    )
