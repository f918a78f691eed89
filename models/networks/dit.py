"""The class-conditional diffusion transformer (DiT) with adaLN-zero (Peebles & Xie 2023) and its configuration.

Modules have the names of diffusers' `DiTTransformer2DModel`, so a state dict of one loads into the other unchanged.
There each block has an embedding of timestep and class of its own. Here, as in the paper and in the published weights,
all blocks share one, which occurs under the name of each block in a state dict and once among the parameters.

Legend: B batch, C channels, H x W the input, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
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

EMBEDDING = "norm1.emb."
"""Part of the name of the embedding's weights in each block."""


@dataclass(frozen=True, kw_only=True)
class DiTConfig(TransformerConfig):
    """Architecture of a `DiT`."""

    conditions: int = 0
    """Number of class embeddings, the null class included; 0 for an unconditional network."""

    def to_diffusers(self) -> JsonObject:
        """Return the `config.json` of a diffusers `DiTTransformer2DModel`, or of a `DiT` where diffusers has none.

        An unconditional network has the null class alone.
        """
        return {
            "_class_name": "DiTTransformer2DModel" if self.in_diffusers else "DiT",
            **self.shared_keys(),
            "num_embeds_ada_norm": max(self.conditions - 1, 0),
            "norm_type": "ada_norm_zero",
            "norm_eps": 1e-5,
        }

    @staticmethod
    def from_diffusers(config: JsonObject) -> DiTConfig:
        """Convert a `config.json`, ours or a published one; absent keys take diffusers' defaults.

        Raises:
            ValueError: for an architecture that this network does not support, in one sentence.
        """
        supported: Supported = {"norm_type": ("ada_norm_zero",), "norm_eps": (1e-5,)}
        classes = config.get("num_embeds_ada_norm", 1000)
        return DiTConfig(**shared_fields(config, supported), conditions=classes + 1 if classes else 0)


class Labels(nn.Module):
    """Class embeddings, of which the last is the null class: int64 [B] -> [B, D]."""

    def __init__(self, conditions: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(conditions, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class Embedding(nn.Module):
    """The sum of the embeddings of timestep and class: t [B] and labels int64 [B] -> [B, D]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.conditions = max(config.conditions, 1)
        self.timestep_embedder = TimeEmbedding(TIME_WIDTH, config.width)
        self.class_embedder = Labels(self.conditions, config.width)

    def forward(self, t: Tensor, labels: Tensor | None, dtype: torch.dtype) -> Tensor:
        if labels is None:
            labels = torch.full_like(t, self.conditions - 1, dtype=torch.int64)
        features = timestep_embedding(t, TIME_WIDTH, freq_shift=1).to(dtype)
        return self.timestep_embedder(features) + self.class_embedder(labels)


class AdaLayerNormZero(nn.Module):
    """Layer norm with a shift and scale that depend on the condition, and the other four modulations of a block."""

    def __init__(self, width: int, embedding: Embedding) -> None:
        super().__init__()
        self.emb = embedding
        self.linear = nn.Linear(width, 6 * width)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)

    def forward(self, tokens: Tensor, condition: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the tokens, and the gate of the attention and shift, scale and gate of the perceptron, [B, D] each."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.linear(condition).chunk(6, dim=1)
        return modulate(self.norm(tokens), shift, scale), gate, mlp_shift, mlp_scale, mlp_gate


class Block(nn.Module):
    """A transformer block with adaLN-zero (Peebles & Xie 2023, figure 3): [B, N, D] -> [B, N, D]."""

    def __init__(self, config: DiTConfig, embedding: Embedding) -> None:
        super().__init__()
        self.norm1 = AdaLayerNormZero(config.width, embedding)
        self.attn1 = Attention(config)
        self.norm3 = nn.LayerNorm(config.width, eps=1e-5, elementwise_affine=False)
        self.ff = FeedForward(config)

    def forward(self, tokens: Tensor, condition: Tensor, rotation: Tensor | None) -> Tensor:
        normed, gate, shift, scale, mlp_gate = self.norm1(tokens, condition)
        tokens = tokens + gate[:, None] * self.attn1(normed, rotation=rotation)
        return tokens + mlp_gate[:, None] * self.ff(modulate(self.norm3(tokens), shift, scale))


class DiT(Transformer):
    """The network: x_t float [B, C, H, W], t int64 or float [B], condition -> output float [B, C, H, W].

    The condition is a class index, int64 [B], of which the last is the null class; None stands for the null class. H
    and W are multiples of the patch size, and need not be those of the configuration.
    """

    OUTPUT = "proj_out_2"

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.config = config
        width, patch = config.width, config.patch_size**2 * config.channels
        embedding = Embedding(config)
        self.transformer_blocks = nn.ModuleList(Block(config, embedding) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.proj_out_1 = nn.Linear(width, 2 * width)
        self.proj_out_2 = nn.Linear(width, patch)
        self.start()

    @property
    def embedding(self) -> Embedding:
        """The embedding that all blocks share."""
        first = self.transformer_blocks[0]
        assert isinstance(first, Block)
        return first.norm1.emb

    def start(self) -> None:
        """Initialise as in the authors' code; a block is the identity at first (section 3.2, adaLN-zero)."""
        super().start()
        time, classes = self.embedding.timestep_embedder, self.embedding.class_embedder
        for weight in (time.linear_1.weight, time.linear_2.weight, classes.embedding_table.weight):
            nn.init.normal_(weight, std=0.02)
        for layer in [self.proj_out_1, *(m.linear for m in self.modules() if isinstance(m, AdaLayerNormZero))]:
            zero(layer)

    def load_published(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights under diffusers' names; of a network with a learned variance, the variance is ignored.

        Raises:
            RuntimeError: if a name or a shape differs.
            ValueError: if the blocks do not share their embedding.
        """
        for name, value in weights.items():
            _, found, rest = name.partition(EMBEDDING)
            first = weights.get(f"transformer_blocks.0.{EMBEDDING}{rest}")
            if found and first is not None and not torch.equal(value, first):
                raise ValueError("the blocks of the network embed timestep and class differently; supported: equally")
        super().load_published(weights)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        embedded = F.silu(self.embedding(t, condition, x.dtype))
        tokens, rotation = self.pos_embed(x)
        tokens = self.apply_blocks(tokens, embedded, rotation)
        shift, scale = self.proj_out_1(embedded).chunk(2, dim=1)
        return self.unpatched(self.proj_out_2(modulate(self.norm_out(tokens), shift, scale)), x)
