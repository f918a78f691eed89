"""The training side of diffusion: noising, targets, loss and loss weighting, on torch tensors.

Legend: `x0` clean images float [B, C, H, W] in [-1, 1]; `eps` standard normal noise of that shape; `a` alpha_bar_t of
each sample, float [B]; `t` int64 [B].
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_noise(x0: Tensor, eps: Tensor, a: Tensor) -> Tensor:
    """Return x_t = sqrt(a) x0 + sqrt(1 - a) eps, float [B, C, H, W] (Ho et al. 2020, eq. 4)."""
    a = a[:, None, None, None]
    return a.sqrt() * x0 + (1 - a).sqrt() * eps


def target(prediction: str, x0: Tensor, eps: Tensor, a: Tensor) -> Tensor:
    """Return what the network learns to predict, float [B, C, H, W]; the names are those of diffusers.

    `epsilon`: eps (Ho et al. 2020). `sample`: x0. `v_prediction`: v = sqrt(a) eps - sqrt(1 - a) x0 (Salimans & Ho 2022,
    section 4).

    Raises:
        ValueError: for another prediction.
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
    """Return the weight of the squared error at each timestep, float32 [T], from alpha_bar float [T].

    `plain` is 1. `min_snr` weights the error of x0 by min(SNR, gamma), whatever the network predicts (Hang et al.
    2023): the squared error of eps is SNR times that of x0, the squared error of v is SNR + 1 times that of x0.

    Raises:
        ValueError: for another weighting or prediction.
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
    """Replace the condition of the samples in `dropped`, bool [B], by `null` (Ho & Salimans 2022, algorithm 1).

    `condition` is int64 [B] and `null` a scalar, or `condition` is float [B, ...] and `null` float [...].
    """
    return torch.where(dropped.reshape(-1, *[1] * (condition.ndim - 1)), null.to(condition.dtype), condition)


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each sample, float32 [B] (Ho et al. 2020, eq. 14)."""
    return (output.float() - target.float()).square().mean(dim=(1, 2, 3))
