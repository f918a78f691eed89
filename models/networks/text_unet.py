"""The text-conditional network: diffusers' `UNet2DConditionModel` with the interface of our U-Net, and its LoRA.

It is diffusers' own network, so that their image-to-image, inpainting, ControlNet and adapter pipelines run on weights
trained here. Sizes range from tiny to Stable Diffusion XL. diffusers and peft are imported where they are used, because
models of pixels load this file and not them (4 s).

Legend: B batch, C channels, H x W an image or latent, L tokens, D width of a token embedding, P of the pooled one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from models.networks.attention import attend
from models.networks.config import DIFFUSERS_VERSION, Supported, require_supported
from models.networks.normalization import replace_group_norms
from models.networks.text_encoder import SIZES

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

    from models.json_files import JsonObject

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
ADAPTER = "default"
SIZE_WIDTH = 256
"""Width of the sinusoidal embedding of each size and crop value in Stable Diffusion XL."""


@dataclass(frozen=True)
class TextUNetConfig:
    """Architecture of a `TextUNet`; the sequences have one entry per resolution, highest first."""

    size: int
    """Height and width of the input."""
    channels: int
    """Channels of the output, and of x in the input."""
    cross_attention_dim: int
    """D: width of the token embeddings."""
    block_out_channels: tuple[int, ...]
    """Channels per resolution; every level but the last halves height and width."""
    attention: tuple[bool, ...]
    """Whether the blocks of a resolution attend to the text."""
    layers_per_block: int
    """Residual blocks per resolution of the encoder; the decoder has one more."""
    norm_num_groups: int
    """Groups of each group norm; a divisor of all widths."""
    attention_head_dim: int | None = None
    """Channels per attention head; not used if `heads` is set. With neither there is a single head."""
    heads: int | None = None
    """Number of attention heads at every resolution."""
    transformer_layers: tuple[int, ...] | None = None
    """Transformer blocks per layer; None is one at every resolution."""
    linear_projection: bool = False
    """Linear instead of convolutional projections around a transformer."""
    dropout: float = 0.0
    """Probability of dropping an activation."""
    pooled: int | None = None
    """P: width of the pooled prompt embedding (SDXL conditioning); None without it."""
    context_channels: int = 0
    """Further channels of the input: mask and latents of the masked image for an inpainting U-Net."""
    lora_rank: int | None = None
    """Rank of the LoRA adapter of the attention layers (Hu et al. 2021), which alone is trained; None without one."""
    control_widths: tuple[int, ...] | None = None
    """Channels of the layers that read a control map, see `models/networks/controlnet.py`; None without a ControlNet.
    """

    def to_diffusers(self) -> JsonObject:
        """Return the `config.json` of the network."""
        heads = [self.heads or width // (self.attention_head_dim or width) for width in self.block_out_channels]
        return {
            "_class_name": "UNet2DConditionModel",
            "_diffusers_version": DIFFUSERS_VERSION,
            "sample_size": self.size,
            "in_channels": self.channels + self.context_channels,
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
            **({} if self.pooled is None else _pooled_conditioning(self.pooled)),
        }

    @staticmethod
    def from_diffusers(config: JsonObject) -> TextUNetConfig:
        """Convert a `config.json`, ours or a published one; absent keys take diffusers' defaults.

        `lora_rank` and `control_widths`, which only training needs, are not part of the file.

        Raises:
            ValueError: for an architecture that this network does not support, in one sentence.
        """
        _require_supported_architecture(config)
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
            channels=config.get("out_channels", 4),
            context_channels=config["in_channels"] - config.get("out_channels", 4),
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


def _require_supported_architecture(config: JsonObject) -> None:
    """Check the options of `UNet2DConditionModel` that are not used here.

    Most of them change no weight's shape: the weights would load, and give other images.
    """
    attention = [name.startswith("CrossAttn") for name in config["down_block_types"]]
    channels = config["in_channels"]
    supported: Supported = {
        "down_block_types": (["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attention],),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "up_block_types": (["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)],),
        # An inpainting U-Net receives the c channels of x, the mask, and the c channels of the masked image.
        "out_channels": (channels, *([channels // 2] if channels % 2 else [])),
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
    require_supported(config, supported, "network")
    if not (isinstance(config["sample_size"], int) and isinstance(config.get("layers_per_block", 2), int)):
        raise ValueError(
            "the network's sample_size and layers_per_block must be one integer each: square images, and the same "
            "number of layers at every resolution"
        )


def _pooled_conditioning(pooled: int) -> JsonObject:
    """Return the options of SDXL's conditioning on the pooled embedding, sizes and crop."""
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_WIDTH,
        "projection_class_embeddings_input_dim": pooled + SIZES * SIZE_WIDTH,
    }


class TextUNet(nn.Module):
    """The network: x_t float [B, C, H, W], t int64 [B], token embeddings float [B, L, D] -> output float [B, C, H, W].

    With `pooled` the condition is packed as [B, L + 1, D], see `models/networks/text_encoder.py`.
    """

    network: UNet2DConditionModel

    def __init__(self, config: TextUNetConfig) -> None:
        from diffusers import UNet2DConditionModel

        super().__init__()
        self.config = config
        arguments = {name: value for name, value in config.to_diffusers().items() if not name.startswith("_")}
        network = UNet2DConditionModel(**arguments)
        nn.init.zeros_(network.conv_out.weight)  # as in `UNet`: the untrained network outputs 0
        nn.init.zeros_(network.conv_out.bias)
        network.set_attn_processor(Attend())
        replace_group_norms(network)
        if config.lora_rank:
            _add_lora(network, config.lora_rank)
        # Its children are registered here and the network itself is not, so that weights keep diffusers' names.
        self.__dict__["network"] = network
        for name, part in network.named_children():
            self.add_module(name, part)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        tokens, added = self.text_inputs(x, condition)
        return self.network(x, t, tokens, added_cond_kwargs=added, return_dict=False)[0]

    def text_inputs(self, x: Tensor, condition: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Return the token embeddings [B, L, D] in the dtype of `x`, and SDXL's further conditions, else None."""
        tokens, pooled = condition.to(x.dtype), self.config.pooled
        if pooled is None:
            return tokens, None
        last = condition[:, -1]
        added = {"text_embeds": last[:, :pooled].to(x.dtype), "time_ids": last[:, pooled : pooled + SIZES]}
        return tokens[:, :-1], added

    def checkpoint_gradients(self) -> None:
        """Enable gradient checkpointing: less memory for activations, a second forward pass of each block."""
        self.network.enable_gradient_checkpointing()

    def train_adapter(self, train: bool) -> None:
        """Train the LoRA adapter and freeze the other weights, or the reverse if `train` is false."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_((".lora_" in name) == train)

    def freeze_in(self, dtype: torch.dtype) -> None:
        """Convert the frozen linear and convolutional layers to `dtype`; norms and the LoRA adapter keep float32.

        Autocast computes these layers in that type anyway; stored in it, they take half of the memory and need no copy.
        """
        for module in self.modules():
            frozen = not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
            if isinstance(module, nn.Linear | nn.Conv2d) and frozen:
                module.to(dtype)

    def own_names(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights under diffusers' names by the names that they have here, beside a LoRA adapter."""
        wrapped = self.config.lora_rank is not None
        return {_wrapped_name(n) if wrapped and _is_target(n) else n: value for n, value in weights.items()}

    def load_published(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights under diffusers' names; the LoRA adapter keeps its weights.

        Raises:
            RuntimeError: if a name or a shape differs.
        """
        named = self.own_names(weights)
        missing, unexpected = self.load_state_dict(named, strict=False)
        missing = [name for name in missing if ".lora_" not in name]
        if missing or unexpected:
            raise RuntimeError(f"the weights belong to another network: {[*missing, *unexpected][:3]}")


class Attend:
    """A diffusers attention processor that calls `attend`, which trains faster on a CPU."""

    def __call__(
        self,
        layer: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Apply cross-attention to the text [B, M, D], or without it self-attention: [B, N, C] -> [B, N, C].

        Raises:
            ValueError: for an attention mask, which is not supported.
        """
        if attention_mask is not None:
            raise ValueError("attention masks are not supported; pass None")
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = layer.to_q(hidden_states), layer.to_k(context), layer.to_v(context)
        q, k, v = (x.unflatten(2, (layer.heads, x.shape[2] // layer.heads)).transpose(1, 2) for x in projected)
        project, dropout = layer.to_out
        return dropout(project(attend(q, k, v).transpose(1, 2).flatten(2)))


def _add_lora(network: UNet2DConditionModel, rank: int) -> None:
    from peft import LoraConfig

    network.requires_grad_(False)
    network.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS), ADAPTER
    )


def _is_target(name: str) -> bool:
    """Return whether a weight belongs to a layer with a LoRA adapter."""
    owner = name.rsplit(".", 1)[0]
    return any(owner.endswith(f".{target}") for target in LORA_TARGETS)


def _wrapped_name(name: str) -> str:
    """Return the name that peft gives the original weight of a layer with an adapter."""
    owner, _, kind = name.rpartition(".")
    return f"{owner}.base_layer.{kind}"


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge the LoRA adapter into the weights: W + B A (Hu et al. 2021, eq. 3, with alpha = rank).

    Returns the state dict of the plain network; weights without an adapter are returned unchanged.
    """
    plain = {name.replace(".base_layer.", "."): value for name, value in weights.items() if ".lora_" not in name}
    for name, down in weights.items():
        if name.endswith(f".lora_A.{ADAPTER}.weight"):
            owner = name.removesuffix(f".lora_A.{ADAPTER}.weight")
            up = weights[f"{owner}.lora_B.{ADAPTER}.weight"]
            plain[f"{owner}.weight"] = plain[f"{owner}.weight"] + (up.float() @ down.float()).to(up.dtype)
    return plain


def adapter(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the LoRA adapter alone under the names of diffusers' `load_lora_weights`; empty without an adapter.

    No scale is stored: diffusers then assumes alpha = rank, which holds here.
    """
    ending = f".{ADAPTER}.weight"
    lora = {f"unet.{name.replace(ending, '.weight')}": v for name, v in weights.items() if name.endswith(ending)}
    if not lora:
        return {}  # without loading diffusers, which takes seconds
    from diffusers.utils import convert_state_dict_to_diffusers

    return dict(convert_state_dict_to_diffusers(lora))
