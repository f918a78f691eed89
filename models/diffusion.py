"""The training side of diffusion: noising, targets, loss and its weighting. Torch tensors.

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
    """What the network learns to output: eps (Ho et al. 2020), x0 ("sample"), or v = sqrt(a) eps - sqrt(1 - a) x0
    (Salimans & Ho 2022, section 4); the names are those of diffusers.

    Raises `ValueError` for another prediction.
    """
    if prediction == "epsilon":
        return eps
    if prediction == "sample":
        return x0
    if prediction == "v_prediction":
        a = a[:, None, None, None]
        return a.sqrt() * eps - (1 - a).sqrt() * x0
    raise ValueError(f"unknown prediction {prediction!r}; known: epsilon, sample, v_prediction")


def loss_weights(weighting: str, prediction: str, alpha_bar: Tensor, gamma: float) -> Tensor:
    """Factor of each timestep's squared error, float32 [T], from alpha_bar float [T].

    `plain`: 1, the error of the network's own output. `min_snr`: what makes that error, whatever the network
    predicts, the error of x0 weighted by min(SNR, gamma) (Hang et al. 2023): the error of eps is SNR
    times, that of v SNR + 1 times the error of x0. Raises `ValueError` for another weighting or prediction.
    """
    snr = alpha_bar.double() / (1 - alpha_bar.double())
    if weighting == "plain":
        return torch.ones_like(snr, dtype=torch.float32)
    if weighting != "min_snr":
        raise ValueError(f"unknown weighting {weighting!r}; known: plain, min_snr")
    per_x0 = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}
    if prediction not in per_x0:
        raise ValueError(f"unknown prediction {prediction!r}; known: {', '.join(per_x0)}")
    return (snr.clamp(max=gamma) / per_x0[prediction]).float()


def drop_condition(condition: Tensor, null: Tensor, dropped: Tensor) -> Tensor:
    """Replace the condition of the `dropped` bool [B] samples by `null` (Ho & Salimans 2022, algorithm 1).

    `condition` is int64 [B] with `null` a scalar, or float [B, E] with `null` float [E].
    """
    return torch.where(dropped.reshape(-1, *[1] * (condition.ndim - 1)), null.to(condition.dtype), condition)


def squared_error(output: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of each sample, float32 [B] (Ho et al. 2020, eq. 14)."""
    return (output.float() - wanted.float()).square().mean(dim=(1, 2, 3))
