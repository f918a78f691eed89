"""The embedding of the timestep, shared by all networks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def timestep_embedding(t: Tensor, width: int, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> Tensor:
    """Sinusoidal features of the timesteps (Vaswani et al. 2017, section 3.5; base 10,000).

    Args:
        t: int64 or float [B].
        width: number of features.
        flip_sin_to_cos: order of the features: [cos, sin] if true, else [sin, cos].
        freq_shift: 1 makes the lowest frequency 1 / 10,000.

    Returns float32 [B, width].
    """
    half = width // 2
    exponents = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(exponents / (half - freq_shift))[None]
    pair = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(pair, dim=1)


class TimeEmbedding(nn.Module):
    """A two-layer perceptron: sinusoidal features [B, width] -> [B, E]."""

    def __init__(self, width: int, embed: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, embed)
        self.linear_2 = nn.Linear(embed, embed)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(features)))
