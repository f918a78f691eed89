"""The training side of diffusion: noising, targets, loss. Torch tensors.

Legend: `x0` clean images float [B, C, H, W] in [-1, 1]; `eps` standard normal of that shape; `a` =
alpha_bar_t of each sample, float [B]; `t` int64 [B].
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_noise(x0: Tensor, eps: Tensor, a: Tensor) -> Tensor:
    """x_t = sqrt(a) x0 + sqrt(1 - a) eps (Ho et al. 2020, eq. 4)."""
    a = a[:, None, None, None]
    return a.sqrt() * x0 + (1 - a).sqrt() * eps


def target(prediction: str, x0: Tensor, eps: Tensor, a: Tensor) -> Tensor:
    """What the network learns to output: eps, or v = sqrt(a) eps - sqrt(1 - a) x0 (Salimans & Ho 2022, section 4).

    Raises `ValueError` for another prediction.
    """
    if prediction == "epsilon":
        return eps
    if prediction == "v_prediction":
        a = a[:, None, None, None]
        return a.sqrt() * eps - (1 - a).sqrt() * x0
    raise ValueError(f"unknown prediction {prediction!r}; known: epsilon, v_prediction")


def drop_condition(condition: Tensor, null: Tensor, dropped: Tensor) -> Tensor:
    """Replace the condition of the `dropped` bool [B] samples by `null` (Ho & Salimans 2022, algorithm 1).

    `condition` is int64 [B] with `null` a scalar, or float [B, E] with `null` float [E].
    """
    return torch.where(dropped.reshape(-1, *[1] * (condition.ndim - 1)), null.to(condition.dtype), condition)


def squared_error(output: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of each sample, float32 [B] (Ho et al. 2020, eq. 14)."""
    return (output.float() - wanted.float()).square().mean(dim=(1, 2, 3))
