"""The U-Net of DDPM (Ho et al. 2020, appendix B) and its configuration.

Modules have the names of diffusers' `UNet2DModel`, so a state dict of one loads into the other unchanged.

Legend: B batch, C channels, H x W pixels, E = 4 * first width (time embedding).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.json_files import JsonObject
from models.networks.attention import attend
from models.networks.config import DIFFUSERS_VERSION, Supported, require_supported
from models.networks.normalization import GroupNorm
from models.networks.time_embedding import TimeEmbedding, timestep_embedding


@dataclass(frozen=True)
class UNetConfig:
    """Architecture of a `UNet`; the sequences have one entry per resolution, highest first."""

    size: int
    """Height and width of the input."""
    channels: int
    """Channels of input and output."""
    block_out_channels: tuple[int, ...]
    """Channels per resolution; every level but the last halves height and width."""
    attention: tuple[bool, ...]
    """Whether the blocks of a resolution have self-attention; the middle block always has it."""
    layers_per_block: int
    """Residual blocks per resolution of the encoder; the decoder has one more."""
    norm_num_groups: int
    """Groups of each group norm; a divisor of all widths."""
    attention_head_dim: int | None
    """Channels per attention head; None is a single head."""
    dropout: float = 0.0
    """Probability of dropping an activation."""
    conditions: int = 0
    """Number of class embeddings, the null class included; 0 for an unconditional network."""
    patch_size: int = 1
    """Side p of the patches whose p^2 C values are channels of the layers (Luhman & Luhman 2022, arXiv 2207.04316)."""
    # The values below differ from these defaults in published weights only.
    norm_eps: float = 1e-5
    """Constant added to the variance in each group norm."""
    flip_sin_to_cos: bool = True
    """Order of the timestep features: [cos, sin] if true, else [sin, cos]."""
    freq_shift: float = 0
    """See `time_embedding.timestep_embedding`."""
    downsample_padding: int = 1
    """Of the strided convolution; 0 pads one row at the bottom and one column on the right."""

    def to_diffusers(self) -> JsonObject:
        """Return the `config.json` of a diffusers `UNet2DModel` with the same weights; its input is the patches."""
        channels = self.channels * self.patch_size**2
        down = ["AttnDownBlock2D" if attention else "DownBlock2D" for attention in self.attention]
        up = ["AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(self.attention)]
        return {
            "_class_name": "UNet2DModel",
            "_diffusers_version": DIFFUSERS_VERSION,
            "sample_size": self.size // self.patch_size,
            "in_channels": channels,
            "out_channels": channels,
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": down,
            "up_block_types": up,
            "layers_per_block": self.layers_per_block,
            "norm_num_groups": self.norm_num_groups,
            "norm_eps": self.norm_eps,
            "attention_head_dim": self.attention_head_dim,
            "dropout": self.dropout,
            "freq_shift": self.freq_shift,
            "flip_sin_to_cos": self.flip_sin_to_cos,
            "downsample_padding": self.downsample_padding,
            "class_embed_type": None,
            "num_class_embeds": self.conditions or None,
            **({"patch_size": self.patch_size} if self.patch_size > 1 else {}),  # diffusers has no such option
        }

    @staticmethod
    def from_diffusers(config: JsonObject) -> UNetConfig:
        """Convert a `config.json`, ours or a published one; absent keys take diffusers' defaults.

        Raises:
            ValueError: for an architecture that this network does not support, in one sentence.
        """
        widths = tuple(config["block_out_channels"])
        attention = tuple(name.startswith("Attn") for name in config["down_block_types"])
        _require_supported_architecture(config, attention)
        patch_size = config.get("patch_size", 1)
        return UNetConfig(
            size=config["sample_size"] * patch_size,
            channels=config["in_channels"] // patch_size**2,
            block_out_channels=widths,
            attention=attention,
            layers_per_block=config.get("layers_per_block", 2),
            norm_num_groups=config.get("norm_num_groups", 32),
            attention_head_dim=config.get("attention_head_dim", 8),
            dropout=config.get("dropout", 0.0),
            conditions=config.get("num_class_embeds") or 0,
            patch_size=patch_size,
            norm_eps=config.get("norm_eps", 1e-5),
            flip_sin_to_cos=config.get("flip_sin_to_cos", True),
            freq_shift=config.get("freq_shift", 0),
            downsample_padding=config.get("downsample_padding", 1),
        )


def _require_supported_architecture(config: JsonObject, attention: tuple[bool, ...]) -> None:
    """Check the options of `UNet2DModel` that this network lacks; most change images, but no weight's shape."""
    up = ["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)]
    down = ["AttnDownBlock2D" if here else "DownBlock2D" for here in attention]
    supported: Supported = {
        "_class_name": ("UNet2DModel",),
        "down_block_types": (down,),
        "mid_block_type": ("UNetMidBlock2D",),
        "up_block_types": (up,),
        "out_channels": (config["in_channels"],),
        "act_fn": ("silu",),
        "add_attention": (True,),
        "attn_norm_num_groups": (None,),
        "center_input_sample": (False,),
        "class_embed_type": (None,),
        "downsample_padding": (0, 1),
        "downsample_type": ("conv",),
        "mid_block_scale_factor": (1,),
        "resnet_time_scale_shift": ("default",),
        "time_embedding_dim": (None,),
        "time_embedding_type": ("positional",),
        "upsample_type": ("conv",),
    }
    require_supported(config, supported, "network")
    if not isinstance(config["sample_size"], int):
        raise ValueError(
            f"the network's sample_size is {config['sample_size']!r}; supported: square images, one integer"
        )


class ResnetBlock(nn.Module):
    """A residual block of two 3x3 convolutions; the time embedding [B, E] is added between them.

    [B, inputs, H, W] -> [B, outputs, H, W].
    """

    def __init__(self, config: UNetConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        self.norm1 = GroupNorm(groups, inputs, eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.block_out_channels[0], outputs)
        self.norm2 = GroupNorm(groups, outputs, eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(embedding))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.conv_shortcut(x) if self.conv_shortcut else x)


class Attention(nn.Module):
    """Self-attention over the H*W positions, with a residual connection: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, config: UNetConfig, width: int) -> None:
        super().__init__()
        self.heads = width // (config.attention_head_dim or width)
        self.group_norm = GroupNorm(config.norm_num_groups, width, config.norm_eps)
        self.to_q, self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        _, width, height, breadth = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        q, k, v = (
            project(tokens).unflatten(2, (self.heads, width // self.heads)).transpose(1, 2)  # [B, heads, HW, C/heads]
            for project in (self.to_q, self.to_k, self.to_v)
        )
        mixed = attend(q, k, v).transpose(1, 2).flatten(2)
        return x + self.to_out[0](mixed).transpose(1, 2).unflatten(2, (height, breadth))


class Downsample(nn.Module):
    """A strided convolution that halves height and width."""

    def __init__(self, width: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if any(self.conv.padding) else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour interpolation that doubles height and width, and a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by self-attention if `attention` is set."""

    recompute = False
    """Gradient checkpointing: store the input of each block only (Chen et al. 2016)."""

    def __init__(self, config: UNetConfig, inputs: list[int], width: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(config, n, width) for n in inputs)
        if attention:
            self.attentions = nn.ModuleList(Attention(config, width) for _ in inputs)
        self.has_attention = attention

    def block(self, i: int, x: Tensor, embedding: Tensor) -> Tensor:
        """Apply block i and its attention, with gradient checkpointing if `recompute` is set."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._block, i, x, embedding, use_reentrant=False)
        return self._block(i, x, embedding)

    def _block(self, i: int, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.resnets[i](x, embedding)
        return self.attentions[i](x) if self.has_attention else x


class DownLevel(Level):
    """One resolution of the encoder; every level but the last halves the resolution at its end."""

    def __init__(self, config: UNetConfig, inputs: list[int], width: int, attention: bool, last: bool) -> None:
        super().__init__(config, inputs, width, attention)
        self.downsamplers = None if last else nn.ModuleList([Downsample(width, config.downsample_padding)])

    def forward(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the output and the skip connections for the decoder."""
        skips = []
        for i in range(len(self.resnets)):
            x = self.block(i, x, embedding)
            skips.append(x)
        if self.downsamplers:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class UpLevel(Level):
    """One resolution of the decoder; every level but the last doubles the resolution at its end."""

    def __init__(self, config: UNetConfig, inputs: list[int], width: int, attention: bool, last: bool) -> None:
        super().__init__(config, inputs, width, attention)
        self.upsamplers = None if last else nn.ModuleList([Upsample(width)])

    def forward(self, x: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        """Concatenate each block's input with the last of `skips`, which is removed from the list."""
        for i in range(len(self.resnets)):
            x = self.block(i, torch.cat([x, skips.pop()], dim=1), embedding)
        return self.upsamplers[0](x) if self.upsamplers else x


class Middle(nn.Module):
    """Residual block, self-attention and residual block at the lowest resolution."""

    def __init__(self, config: UNetConfig, width: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(config, width, width) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(config, width)])

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, embedding))
        return self.resnets[1](x, embedding)


class UNet(nn.Module):
    """The network: x_t float [B, C, H, W], t int64 or float [B], condition -> output float [B, C, H, W].

    The condition is a class index, int64 [B], of which the last is the null class; None for an unconditional network.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, layers = config.block_out_channels, config.layers_per_block
        embed = 4 * widths[0]
        self.time_embedding = TimeEmbedding(widths[0], embed)
        self.class_embedding = nn.Embedding(config.conditions, embed) if config.conditions else None
        channels = config.channels * config.patch_size**2
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)

        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            inputs = [skips[-1]] + [width] * (layers - 1)
            self.down_blocks.append(DownLevel(config, inputs, width, config.attention[level], last))
            skips += [width] * (layers + (not last))

        self.mid_block = Middle(config, widths[-1])

        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            inputs = []
            for _ in range(layers + 1):
                inputs.append(below + skips.pop())
                below = width
            self.up_blocks.append(UpLevel(config, inputs, width, config.attention[level], level == 0))

        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], channels, 3, padding=1)
        self._start_as_identity()

    def _start_as_identity(self) -> None:
        """Set the last layer of every residual branch and of the network to zero, as in the authors' code."""
        branches = [m.conv2 for m in self.modules() if isinstance(m, ResnetBlock)]
        for layer in [*branches, self.conv_out]:
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def checkpoint_gradients(self) -> None:
        """Enable gradient checkpointing: less memory for activations, a second forward pass of each block."""
        for module in self.modules():
            if isinstance(module, Level):
                module.recompute = True

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        first, flip, shift = self.config.block_out_channels[0], self.config.flip_sin_to_cos, self.config.freq_shift
        embedding = self.time_embedding(timestep_embedding(t, first, flip, shift).to(x.dtype))
        if self.class_embedding is not None and condition is not None:
            embedding = embedding + self.class_embedding(condition)
        patch_size = self.config.patch_size
        x = self.conv_in(F.pixel_unshuffle(x, patch_size) if patch_size > 1 else x)
        skips = [x]
        for down in self.down_blocks:
            x, more = down(x, embedding)
            skips += more
        x = self.mid_block(x, embedding)
        for up in self.up_blocks:
            x = up(x, skips, embedding)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return F.pixel_shuffle(x, patch_size) if patch_size > 1 else x
