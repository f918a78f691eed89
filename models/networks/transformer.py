"""What both transformers share: configuration, patches, positions, attention, feed-forward layers, loading of weights.

Modules have the names of diffusers' transformers.

Legend: B batch, C channels, H x W the input, p patch size, N = H W / p^2 tokens, D width, h heads, d = D / h, M tokens
that are attended to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.json_files import JsonObject
from models.networks.attention import attend
from models.networks.config import DIFFUSERS_VERSION, Supported, require_supported

TIME_WIDTH = 256
"""Number of sinusoidal features of the timestep."""
ROPE_BASE = 100.0
PUBLISHED_MLP_RATIO = 4.0
"""The only ratio that diffusers' transformers have."""
OPTIONS = ("mlp_ratio", "qk_norm", "rope")
"""Fields that diffusers' transformers lack."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The fields that the configurations of both transformers have."""

    size: int
    """Height and width of a square input."""
    channels: int
    """Channels of input and output."""
    patch_size: int
    """Side of a patch, which becomes one token."""
    width: int
    """Width of a token."""
    depth: int
    """Number of blocks."""
    heads: int
    """Attention heads per block; a divisor of `width`."""
    mlp_ratio: float = PUBLISHED_MLP_RATIO
    """Hidden width of the feed-forward layers relative to `width`."""
    qk_norm: bool = False
    """Normalise queries and keys, which keeps attention from saturating (Dehghani et al. 2023, section 2)."""
    rope: bool = False
    """Rotate queries and keys by their position in the image instead of adding positions to the tokens."""
    dropout: float = 0.0
    """Probability of dropping an activation."""

    @property
    def in_diffusers(self) -> bool:
        """Whether diffusers has a transformer of this architecture."""
        return self.mlp_ratio == PUBLISHED_MLP_RATIO and not (self.qk_norm or self.rope)

    def shared_keys(self) -> JsonObject:
        """Return the keys of a `config.json` that both transformers have."""
        return {
            "_diffusers_version": DIFFUSERS_VERSION,
            "sample_size": self.size,
            "in_channels": self.channels,
            "out_channels": self.channels,
            "patch_size": self.patch_size,
            "num_layers": self.depth,
            "num_attention_heads": self.heads,
            "attention_head_dim": self.width // self.heads,
            "dropout": self.dropout,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "norm_elementwise_affine": False,
            **({} if self.in_diffusers else {name: getattr(self, name) for name in OPTIONS}),
        }


def shared_fields(config: JsonObject, supported: Supported) -> JsonObject:
    """Return the fields of `TransformerConfig` in a `config.json`; absent keys take diffusers' defaults.

    Args:
        config: the file's content.
        supported: the supported values of keys that only one of the transformers has.

    Raises:
        ValueError: for an unsupported architecture, in one sentence.
    """
    heads, channels = config.get("num_attention_heads", 16), config.get("in_channels", 4)
    both: Supported = {
        "out_channels": (None, channels, 2 * channels),  # twice as many: with a learned variance, which is ignored
        "activation_fn": ("gelu-approximate",),
        "attention_bias": (True,),
        "norm_elementwise_affine": (False,),
        "upcast_attention": (False,),
    }
    require_supported(config, {**both, **supported}, "network")
    return {
        "size": config.get("sample_size", 32),
        "channels": channels,
        "patch_size": config.get("patch_size", 2),
        "width": heads * config.get("attention_head_dim", 72),
        "depth": config.get("num_layers", 28),
        "heads": heads,
        "dropout": config.get("dropout", 0.0),
        **{name: config[name] for name in OPTIONS if name in config},
    }


def grid_positions(rows: int, columns: int, side: int, device: torch.device | None = None) -> Tensor:
    """Return the position (x, y) of each patch, float64 [rows * columns, 2], row by row.

    In a square of `side` patches they are 0, 1, 2 and so on. Any other grid is stretched over the same square, so that
    another aspect ratio has positions in the range that was trained.
    """
    y, x = (torch.arange(n, dtype=torch.float64, device=device) * (side / n) for n in (rows, columns))
    return torch.stack([x.repeat(rows), y.repeat_interleave(columns)], dim=1)


def sin_cos_positions(positions: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding of positions [N, 2], one half of the features per axis; returns float32 [N, width].

    As in the code of Peebles & Xie 2023, which follows that of He et al. 2022; base 10,000.
    """
    quarter = width // 4
    exponents = torch.arange(quarter, dtype=torch.float64, device=positions.device) / quarter
    angles = positions[:, :, None] * 10_000**-exponents  # [N, 2, width / 4]
    return torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1).float()


def rotations(positions: Tensor, width: int) -> Tensor:
    """Cosine and sine of the rotary angles of positions [N, 2]; returns float32 [2, N, width / 2].

    Axial RoPE (Heo et al. 2024, eq. 11; base 100): of the width / 2 planes of a head, one half rotates with x and the
    other with y.
    """
    quarter = width // 4
    exponents = torch.arange(quarter, dtype=torch.float64, device=positions.device) / quarter
    angles = (positions[:, :, None] * ROPE_BASE**-exponents).flatten(1)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate each plane (x_i, x_{i + d / 2}) of x [B, h, N, d] by `rotations` [2, N, d / 2]."""
    first, second = x.chunk(2, dim=3)
    cos, sin = rotation[0], rotation[1]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=3)


class PatchEmbed(nn.Module):
    """Patches to tokens: [B, C, H, W] -> [B, N, D]; sinusoidal positions are added here, rotations are returned."""

    positions: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config, self.side = config, config.size // config.patch_size
        self.proj = nn.Conv2d(config.channels, config.width, config.patch_size, stride=config.patch_size)
        self.register_buffer("positions", self._positions(self.side, self.side), persistent=False)

    def _positions(self, rows: int, columns: int, device: torch.device | None = None) -> Tensor:
        """Return what the grid needs: `rotations` with RoPE, else `sin_cos_positions`."""
        grid = grid_positions(rows, columns, self.side, device)
        if self.config.rope:
            return rotations(grid, self.config.width // self.config.heads)
        return sin_cos_positions(grid, self.config.width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the tokens, and the rotations of queries and keys or None."""
        rows, columns = (side // self.config.patch_size for side in x.shape[2:])
        square = rows == columns == self.side
        positions = self.positions if square else self._positions(rows, columns, x.device)
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        return (tokens, positions) if self.config.rope else (tokens + positions, None)


class Attention(nn.Module):
    """Multi-head attention of the tokens to themselves or to a text: [B, N, D] -> [B, N, D]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.to_q, self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(config.dropout)])
        if config.qk_norm:
            self.norm_q, self.norm_k = (nn.RMSNorm(width // config.heads, eps=1e-6) for _ in range(2))
        self.qk_norm = config.qk_norm

    def forward(self, x: Tensor, context: Tensor | None = None, rotation: Tensor | None = None) -> Tensor:
        """Attend to the context [B, M, D], or to x itself without one."""
        context = x if context is None else context
        q, k, v = (
            projected.unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, h, N or M, d]
            for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        if self.qk_norm:
            q, k = self.norm_q(q.float()), self.norm_k(k.float())
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        mixed = attend(q.to(v.dtype), k.to(v.dtype), v).transpose(1, 2).flatten(2)
        project, dropout = self.to_out
        return dropout(project(mixed))


class Gelu(nn.Module):
    """A linear layer and GELU in its tanh approximation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """The perceptron of a block: [B, N, D] -> [B, N, D]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden = int(config.mlp_ratio * config.width)
        layers = [Gelu(config.width, hidden), nn.Dropout(config.dropout), nn.Linear(hidden, config.width)]
        self.net = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x (1 + scale) + shift for tokens [B, N, D] and one shift and scale per sample, [B, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Transformer(nn.Module):
    """The outer part of both transformers: patches in, blocks in between, patches out."""

    OUTPUT: ClassVar[str]
    """Name of the last layer."""
    recompute = False
    """Gradient checkpointing: store the input of each block only (Chen et al. 2016)."""
    transformer_blocks: nn.ModuleList

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.pos_embed = PatchEmbed(config)

    def checkpoint_gradients(self) -> None:
        """Enable gradient checkpointing: less memory for activations, a second forward pass of each block."""
        self.recompute = True

    def apply_blocks(self, tokens: Tensor, *inputs: Tensor | None) -> Tensor:
        """Apply all blocks to tokens [B, N, D] with the same `inputs`."""
        for block in self.transformer_blocks:
            if self.recompute and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, *inputs, use_reentrant=False)
            else:
                tokens = block(tokens, *inputs)
        return tokens

    def unpatched(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Put tokens [B, N, p p C] together to an output of the shape of the input x, [B, C, H, W]."""
        _, channels, height, width = x.shape
        p = self.pos_embed.config.patch_size
        patches = tokens.unflatten(2, (p, p, channels)).unflatten(1, (height // p, width // p))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def start(self) -> None:
        """Initialise as in the authors' code: Xavier, and a last layer of zeros, so that the network outputs 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.view(self.pos_embed.config.width, -1))
        if self.pos_embed.proj.bias is not None:
            nn.init.zeros_(self.pos_embed.proj.bias)
        zero(self.get_submodule(self.OUTPUT))

    def load_published(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights under diffusers' names; of a network with a learned variance, the variance is ignored.

        Raises:
            RuntimeError: if a name or a shape differs.
        """
        own = {name: value for name, value in weights.items() if name != "pos_embed.pos_embed"}  # a constant
        channels = self.pos_embed.config.channels
        for name, parameter in self.get_submodule(self.OUTPUT).named_parameters(self.OUTPUT):
            if name in own and len(own[name]) == 2 * len(parameter):
                own[name] = own[name].unflatten(0, (-1, 2 * channels))[:, :channels].flatten(0, 1)
        self.load_state_dict(own)


def zero(layer: nn.Module) -> None:
    """Set the parameters of a layer to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
