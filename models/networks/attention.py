"""Scaled dot-product attention, shared by all networks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention, softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017, eq. 1).

    q: [B, heads, N, D]; k and v: [B, heads, M, D]. Returns [B, heads, N, D].

    PyTorch's fused kernel does not store the [N, M] matrix. On a CPU, however, its backward pass over few tokens M
    takes up to twice as long as the plain formula, and up to fifteen times as long in bfloat16; training on a CPU
    therefore uses the formula for small M.
    """
    small = 256 if q.dtype == torch.bfloat16 else 32
    if q.requires_grad and q.device.type == "cpu" and k.shape[2] <= small:
        return torch.softmax(q * q.shape[3] ** -0.5 @ k.transpose(2, 3), dim=3) @ v
    return F.scaled_dot_product_attention(q, k, v)
