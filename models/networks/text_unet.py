"""The text-conditional network: diffusers' `UNet2DConditionModel`, from tiny to Stable Diffusion XL, called as ours is.

It is theirs so that image-to-image, inpainting, ControlNet and adapters run on what is trained here. Legend: B batch,
C channels, H x W the side of an image or latent, L tokens, D width of their embeddings, P of the pooled one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.networks.published import require
from models.networks.text_encoder import SIZES
from models.networks.unet import attend

if TYPE_CHECKING:
    from collections.abc import Mapping

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
ADAPTER = "default"
SIZE_WIDTH = 256
"""Sines and cosines by which Stable Diffusion XL is told each number of size and crop."""


@dataclass(frozen=True)
class TextUNetConfig:
    """What shapes the network. `attention` says at which resolutions it looks at the text, highest first; heads are
    `heads` everywhere, or as many as there are `attention_head_dim` channels (one where both are None)."""

    size: int
    channels: int
    cross_attention_dim: int
    block_out_channels: tuple[int, ...]
    attention: tuple[bool, ...]
    layers_per_block: int
    norm_num_groups: int
    attention_head_dim: int | None = None
    heads: int | None = None
    transformer_layers: tuple[int, ...] | None = None
    """Transformer blocks at each resolution; None is one everywhere."""
    linear_projection: bool = False
    dropout: float = 0.0
    pooled: int | None = None
    """P of a network that is told a pooled embedding, sizes and crop, as Stable Diffusion XL is; None is not told."""
    lora_rank: int | None = None
    """Train low-rank additions to the attention's matrices (Hu et al. 2021) and nothing else."""

    def to_diffusers(self) -> dict[str, Any]:
        """The `config.json` of the network."""
        heads = [self.heads or width // (self.attention_head_dim or width) for width in self.block_out_channels]
        added = {} if self.pooled is None else _added(self.pooled)
        return {
            "_class_name": "UNet2DConditionModel",
            "_diffusers_version": "0.42.1",
            "sample_size": self.size,
            "in_channels": self.channels,
            "out_channels": self.channels,
            "cross_attention_dim": self.cross_attention_dim,
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": ["CrossAttnDownBlock2D" if flag else "DownBlock2D" for flag in self.attention],
            "up_block_types": ["CrossAttnUpBlock2D" if flag else "UpBlock2D" for flag in reversed(self.attention)],
            "layers_per_block": self.layers_per_block,
            "norm_num_groups": self.norm_num_groups,
            "attention_head_dim": heads,  # diffusers' name for the number of heads
            "transformer_layers_per_block": list(self.transformer_layers or [1] * len(self.attention)),
            "use_linear_projection": self.linear_projection,
            "dropout": self.dropout,
            **added,
        }

    @staticmethod
    def from_diffusers(config: dict[str, Any]) -> TextUNetConfig:
        """Inverse of `to_diffusers`, without what was only for training; absent keys have diffusers' defaults.

        Raises `ValueError` in one sentence for a `UNet2DConditionModel` that this one cannot be.
        """
        _refuse_other_architectures(config)
        pooled = None
        if config.get("addition_embed_type") == "text_time":
            pooled = config["projection_class_embeddings_input_dim"] - SIZES * config["addition_time_embed_dim"]
        heads = config.get("attention_head_dim", 8)
        widths = tuple(config["block_out_channels"])
        layers = config.get("transformer_layers_per_block", 1)
        heads = [heads] * len(widths) if isinstance(heads, int) else heads
        per_head = {width // count for width, count in zip(widths, heads, strict=True)}
        return TextUNetConfig(
            size=config["sample_size"],
            channels=config["in_channels"],
            cross_attention_dim=config.get("cross_attention_dim", 1280),
            block_out_channels=widths,
            attention=tuple(name.startswith("CrossAttn") for name in config["down_block_types"]),
            layers_per_block=config.get("layers_per_block", 2),
            norm_num_groups=config.get("norm_num_groups", 32),
            attention_head_dim=per_head.pop() if len(per_head) == 1 else None,
            heads=heads[0] if len(set(heads)) == 1 else None,
            transformer_layers=tuple([layers] * len(widths) if isinstance(layers, int) else layers),
            linear_projection=config.get("use_linear_projection", False),
            dropout=config.get("dropout", 0.0),
            pooled=pooled,
        )


def _refuse_other_architectures(config: dict[str, Any]) -> None:
    """Compare what a `UNet2DConditionModel` can be and is not here. Most of it shapes no weight: other weights would
    load, and draw something else."""
    attention = [name.startswith("CrossAttn") for name in config["down_block_types"]]
    wanted: dict[str, tuple[Any, ...]] = {
        "down_block_types": (["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attention],),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "up_block_types": (["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)],),
        "out_channels": (config["in_channels"],),
        "act_fn": ("silu",),
        "addition_embed_type": (None, "text_time"),
        "addition_time_embed_dim": (None, SIZE_WIDTH),
        "attention_type": ("default",),
        "center_input_sample": (False,),
        "class_embed_type": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "cross_attention_norm": (None,),
        "downsample_padding": (1,),
        "dual_cross_attention": (False,),
        "encoder_hid_dim_type": (None,),
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "mid_block_scale_factor": (1,),
        "norm_eps": (1e-5,),
        "num_attention_heads": (None,),
        "num_class_embeds": (None,),
        "only_cross_attention": (False,),
        "resnet_out_scale_factor": (1.0,),
        "resnet_skip_time_act": (False,),
        "resnet_time_scale_shift": ("default",),
        "reverse_transformer_layers_per_block": (None,),
        "time_cond_proj_dim": (None,),
        "time_embedding_act_fn": (None,),
        "time_embedding_dim": (None,),
        "time_embedding_type": ("positional",),
        "timestep_post_act": (None,),
    }
    require(config, wanted, "the network's", "this U-Net knows")
    if not (isinstance(config["sample_size"], int) and isinstance(config.get("layers_per_block", 2), int)):
        raise ValueError("the network is of no square images, or has other numbers of layers at each resolution")


def _added(pooled: int) -> dict[str, Any]:
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_WIDTH,
        "projection_class_embeddings_input_dim": pooled + SIZES * SIZE_WIDTH,
    }


class TextUNet(nn.Module):
    """x_t [B, C, H, W], t int64 [B], token embeddings float [B, L, D] -> the network's output [B, C, H, W].

    With `pooled` the condition is packed, [B, L + 1, D], see `models/networks/text_encoder.py`.
    """

    def __init__(self, config: TextUNetConfig) -> None:
        from diffusers import UNet2DConditionModel

        super().__init__()
        self.config = config
        arguments = {name: value for name, value in config.to_diffusers().items() if not name.startswith("_")}
        network = UNet2DConditionModel(**arguments)
        nn.init.zeros_(network.conv_out.weight)  # as our own network starts: its first prediction is 0
        nn.init.zeros_(network.conv_out.bias)
        network.set_attn_processor(Attend())
        if config.lora_rank:
            _add_lora(network, config.lora_rank)
        # Its parts become ours under their own names, and it stays out of sight: weights bear diffusers' names.
        self.__dict__["network"] = network
        for name, part in network.named_children():
            self.add_module(name, part)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        tokens, told, pooled = condition.to(x.dtype), None, self.config.pooled
        if pooled is not None:
            tokens, last = tokens[:, :-1], condition[:, -1]
            told = {"text_embeds": last[:, :pooled].to(x.dtype), "time_ids": last[:, pooled : pooled + SIZES]}
        return self.network(x, t, tokens, added_cond_kwargs=told, return_dict=False)[0]

    def checkpoint_gradients(self) -> None:
        """Trade time for memory in training: activations inside a block are computed twice instead of kept."""
        self.network.enable_gradient_checkpointing()

    def train_additions(self, alone: bool) -> None:
        """Train the low-rank additions and nothing else, as from the beginning, or everything but them."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_((".lora_" in name) == alone)

    def load_published(self, weights: Mapping[str, Tensor]) -> None:
        """Load diffusers' weights, around which the low-rank additions stay as they are. Raises `RuntimeError` where
        a name or shape differs."""
        named = {
            _around(name, self.config.lora_rank is not None and _is_target(name)): value
            for name, value in weights.items()
        }
        missing, unexpected = self.load_state_dict(named, strict=False)
        missing = [name for name in missing if ".lora_" not in name]
        if missing or unexpected:
            raise RuntimeError(f"weights are of another network: {[*missing, *unexpected][:3]}")


class Attend:
    """What diffusers' attention does between its projections, by `attend`, which is faster to train on a CPU."""

    def __call__(
        self,
        layer: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Tokens [B, N, C], which look at those of the text [B, M, D] or at each other -> [B, N, C].

        Raises `ValueError` for a mask, which no network of ours is given.
        """
        if attention_mask is not None:
            raise ValueError("attention here knows no mask; give none")
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = layer.to_q(hidden_states), layer.to_k(seen), layer.to_v(seen)
        q, k, v = (x.unflatten(2, (layer.heads, x.shape[2] // layer.heads)).transpose(1, 2) for x in projected)
        project, dropout = layer.to_out
        return dropout(project(attend(q, k, v).transpose(1, 2).flatten(2)))


def _add_lora(network: Any, rank: int) -> None:
    from peft import LoraConfig

    network.requires_grad_(False)
    network.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS), ADAPTER
    )


def _is_target(name: str) -> bool:
    owner = name.rsplit(".", 1)[0]
    return any(owner.endswith(f".{target}") for target in LORA_TARGETS)


def _around(name: str, wrapped: bool) -> str:
    owner, _, kind = name.rpartition(".")
    return f"{owner}.base_layer.{kind}" if wrapped else name


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with low-rank additions -> those of the plain network: W + B A (Hu et al. 2021, eq. 3; alpha = rank)."""
    plain = {name.replace(".base_layer.", "."): value for name, value in weights.items() if ".lora_" not in name}
    for name, down in weights.items():
        if name.endswith(f".lora_A.{ADAPTER}.weight"):
            owner = name.removesuffix(f".lora_A.{ADAPTER}.weight")
            up = weights[f"{owner}.lora_B.{ADAPTER}.weight"]
            plain[f"{owner}.weight"] = plain[f"{owner}.weight"] + (up.float() @ down.float()).to(up.dtype)
    return plain


def adapter(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The low-rank additions alone, named as diffusers' `load_lora_weights` wants them; nothing where there are none.

    Their scale is not stored: without one it is taken to be the rank, as it is here.
    """
    from diffusers.utils import convert_state_dict_to_diffusers

    ending = f".{ADAPTER}.weight"
    additions = {f"unet.{name.replace(ending, '.weight')}": v for name, v in weights.items() if name.endswith(ending)}
    return convert_state_dict_to_diffusers(additions) if additions else {}


def parameter_count(config: TextUNetConfig) -> int:
    """Number of weights, found without memory for one."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in TextUNet(config).parameters())
