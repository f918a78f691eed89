"""The training side of diffusion: noising, targets, loss and loss weighting, on torch tensors.

Legend: `x0` clean images float [B, C, H, W] in [-1, 1]; `eps` standard normal noise of that shape; `alpha` and `sigma`
the scales of both at each sample's noise level, float [B] (see `models/noise/paths.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.noise.paths import coefficients, eliminated, error_scale


def add_noise(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return x_t = alpha x0 + sigma eps, float [B, C, H, W] (Ho et al. 2020, eq. 4; Liu et al. 2023, section 2.1)."""
    return _wide(alpha) * x0 + _wide(sigma) * eps


def target(prediction: str, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return what the network learns to predict, float [B, C, H, W]; see `paths.coefficients`.

    Raises:
        ValueError: for an unknown prediction type.
    """
    of_x0, of_eps = coefficients(prediction, _wide(alpha), _wide(sigma))
    return of_x0 * x0 + of_eps * eps


def denoised(prediction: str, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the clean images that the network `output` at `x` predicts, float [B, C, H, W]; see `paths.eliminated`.

    Raises:
        ValueError: for an unknown prediction type.
    """
    return eliminated(prediction, output, x, _wide(alpha), _wide(sigma))


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def loss_weights(weighting: str, prediction: str, alpha: Tensor, sigma: Tensor, gamma: float) -> Tensor:
    """Return the weight of the squared error of the network output at noise levels (alpha, sigma), float64 [B].

    `plain` is 1. `min_snr` weights the error of x0 by min(SNR, gamma), whatever the network predicts (Hang et al.
    2023); `paths.error_scale` converts between the two errors.

    Raises:
        ValueError: for another weighting or prediction type.
    """
    alpha, sigma = alpha.double(), sigma.double()
    if weighting == "plain":
        return torch.ones_like(alpha)
    if weighting != "min_snr":
        raise ValueError(f"unknown weighting {weighting!r}; known: plain, min_snr")
    snr = (alpha / sigma) ** 2
    return snr.clamp(max=gamma) / error_scale(prediction, snr, alpha, sigma)


def drop_condition(condition: Tensor, null: Tensor, dropped: Tensor) -> Tensor:
    """Replace the condition of the samples in `dropped`, bool [B], by `null` (Ho & Salimans 2022, algorithm 1).

    `condition` is int64 [B] and `null` a scalar, or `condition` is float [B, ...] and `null` float [...].
    """
    return torch.where(dropped.reshape(-1, *[1] * (condition.ndim - 1)), null.to(condition.dtype), condition)


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each sample, float32 [B] (Ho et al. 2020, eq. 14)."""
    return (output.float() - target.float()).square().mean(dim=(1, 2, 3))
