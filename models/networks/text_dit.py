"""The text-conditional diffusion transformer: DiT with cross-attention and one shared adaLN (Chen et al. 2023, PixArt).

Modules have the names of diffusers' `PixArtTransformer2DModel`, so a state dict of one loads into the other unchanged.
The text is whatever encoder the codec has; PixArt's own is T5.

Legend: B batch, C channels, H x W the input, N tokens, D width, L text tokens, E width of a text embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.json_files import JsonObject
from models.networks.time_embedding import TimeEmbedding, timestep_embedding
from models.networks.transformer import (
    TIME_WIDTH,
    Attention,
    FeedForward,
    Transformer,
    TransformerConfig,
    modulate,
    shared_fields,
    zero,
)

if TYPE_CHECKING:
    from models.networks.config import Supported

CONDITIONED_SIZE = 128
"""The input size at which diffusers' transformer is also conditioned on the resolution, by default."""


@dataclass(frozen=True, kw_only=True)
class TextDiTConfig(TransformerConfig):
    """Architecture of a `TextDiT`."""

    text_width: int
    """E: width of the text embeddings."""

    def to_diffusers(self) -> JsonObject:
        """Return the `config.json` of a diffusers `PixArtTransformer2DModel`, or of a `TextDiT` where it has none."""
        return {
            "_class_name": "PixArtTransformer2DModel" if self.in_diffusers else "TextDiT",
            **self.shared_keys(),
            "cross_attention_dim": self.width,
            "caption_channels": self.text_width,
            "interpolation_scale": 1,
            "use_additional_conditions": False,
            "norm_type": "ada_norm_single",
            "norm_eps": 1e-6,
        }

    @staticmethod
    def from_diffusers(config: JsonObject) -> TextDiTConfig:
        """Convert a `config.json`, ours or a published one; absent keys take diffusers' defaults.

        Raises:
            ValueError: for an architecture that this network does not support, in one sentence.
        """
        size = config.get("sample_size", 128)
        scale, more = config.get("interpolation_scale"), config.get("use_additional_conditions")
        resolved = {
            "out_channels": 8,
            "cross_attention_dim": 1152,
            **config,
            "sample_size": size,
            # the values that diffusers puts in the place of None
            "interpolation_scale": max(size // 64, 1) if scale is None else scale,
            "use_additional_conditions": size == CONDITIONED_SIZE if more is None else more,
        }
        supported: Supported = {
            "norm_type": ("ada_norm_single",),
            "norm_eps": (1e-6,),
            "attention_type": ("default",),
            "cross_attention_dim": (resolved.get("num_attention_heads", 16) * resolved.get("attention_head_dim", 72),),
            "interpolation_scale": (1,),
            "use_additional_conditions": (False,),
        }
        shared = shared_fields(resolved, supported)
        if resolved.get("caption_channels") is None:
            raise ValueError("the network's caption_channels is None; supported: the width of the text embeddings")
        return TextDiTConfig(**shared, text_width=resolved["caption_channels"])


class TextProjection(nn.Module):
    """A two-layer perceptron: text embeddings [B, L, E] -> [B, L, D]."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))


class TimestepEmbedder(nn.Module):
    """Timesteps [B] -> [B, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = TimeEmbedding(TIME_WIDTH, width)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.timestep_embedder(timestep_embedding(t, TIME_WIDTH).to(dtype))


class SharedModulation(nn.Module):
    """The six modulations that all blocks have in common (adaLN-single, Chen et al. 2023, section 2.3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb = TimestepEmbedder(width)
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the modulations, [B, 6, D], and the embedded timestep, [B, D]."""
        embedded = self.emb(t, dtype)
        return self.linear(F.silu(embedded)).unflatten(1, (6, -1)), embedded


class TextBlock(nn.Module):
    """Self-attention, cross-attention to the text and perceptron (Chen et al. 2023, figure 4): [B, N, D] -> [B, N, D].

    `scale_shift_table` holds the block's own part of the modulations.
    """

    def __init__(self, config: TextDiTConfig) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, config.width) / config.width**0.5)
        self.norm1, self.norm2 = (nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.attn1, self.attn2 = Attention(config), Attention(config)
        self.ff = FeedForward(config)

    def forward(self, tokens: Tensor, shared: Tensor, text: Tensor, rotation: Tensor | None) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (self.scale_shift_table + shared).unbind(1)  # [B, D] each
        tokens = tokens + gate[:, None] * self.attn1(modulate(self.norm1(tokens), shift, scale), rotation=rotation)
        tokens = tokens + self.attn2(tokens, text)
        return tokens + mlp_gate[:, None] * self.ff(modulate(self.norm2(tokens), mlp_shift, mlp_scale))


class TextDiT(Transformer):
    """The network: x_t float [B, C, H, W], t int64 or float [B], text float [B, L, E] -> output float [B, C, H, W].

    H and W are multiples of the patch size, and need not be those of the configuration.
    """

    OUTPUT = "proj_out"

    def __init__(self, config: TextDiTConfig) -> None:
        super().__init__(config)
        self.config = config
        self.transformer_blocks = nn.ModuleList(TextBlock(config) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, config.width) / config.width**0.5)
        self.proj_out = nn.Linear(config.width, config.patch_size**2 * config.channels)
        self.adaln_single = SharedModulation(config.width)
        self.caption_projection = TextProjection(config.text_width, config.width)
        self.start()

    def start(self) -> None:
        """Initialise as in the authors' code; the text has no influence at first."""
        super().start()
        time, text = self.adaln_single.emb.timestep_embedder, self.caption_projection
        for layer in (time.linear_1, time.linear_2, self.adaln_single.linear, text.linear_1, text.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
        for block in self.modules():
            if isinstance(block, TextBlock):
                zero(block.attn2.to_out[0])

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        shared, embedded = self.adaln_single(t, x.dtype)
        text = self.caption_projection(condition.to(x.dtype))
        tokens, rotation = self.pos_embed(x)
        tokens = self.apply_blocks(tokens, shared, text, rotation)
        shift, scale = (self.scale_shift_table + embedded[:, None]).unbind(1)
        return self.unpatched(self.proj_out(modulate(self.norm_out(tokens), shift, scale)), x)
