"""Easy consistency tuning (Geng et al. 2024): a trained denoiser becomes a consistency model, which draws in few steps.

A consistency model f maps x_t at any noise level to the end x_0 of the trajectory through it (Song et al. 2023). Here
f is the clean image that the network predicts, so f(x, clean) = x holds by construction for v and for the velocity of
a flow, and tuning starts from a trained network. Training pairs a noise level t with an earlier one r < t, both with
the same noise, and the gap between them shrinks stage by stage; with r = 0 the target is x_0, as in denoising.

Legend: `x0`, `eps`, `t`, `alpha`, `sigma` as in `diffusion.py`; s = sigma / alpha the noise relative to an image
in [-1, 1], float64 [B], which is the t of the paper, and r the same for the earlier level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.noise.paths import DiffusionPath
from models.optimization.diffusion import add_noise, denoised
from models.optimization.timesteps import Density

if TYPE_CHECKING:
    from models.optimization.timesteps import Timesteps

NOISIEST = 1000.0
"""Relative noise that pure noise, where it is infinite, counts as."""


@dataclass(frozen=True)
class Tuning:
    """Hyperparameters, named as in Geng et al. 2024."""

    q: float = 2.0
    """Each stage divides the gap between t and r by q."""
    k: float = 8.0
    """How much wider the gap is at low noise, see `b`."""
    b: float = 1.0
    """n(t) = 1 + k sigmoid(-b t) widens the gap at low noise."""
    c: float = 0.00054
    """Constant of the pseudo-Huber loss, for values in [-1, 1] (Song & Dhariwal 2024, section 3.3)."""
    d: int = 100
    """Steps per stage."""
    mean: float = -1.1
    """Mean of log s at the training levels, see `std`."""
    std: float = 2.0
    """log s ~ N(mean, std^2) for the training levels."""

    @property
    def density(self) -> Density:
        """The distribution of the training timesteps; log SNR is -2 log s."""
        return Density("normal_log_snr", -2 * self.mean, 2 * self.std)


def ratio(s: Tensor, step: int, tuning: Tuning) -> Tensor:
    """Return r / s at 0-based tuning `step`: 1 - n(s) / q^(stage + 1), at least 0 (Geng et al. 2024, eq. 11)."""
    n = 1 + tuning.k * torch.sigmoid(-tuning.b * s)
    return (1 - n / tuning.q ** (step // tuning.d + 1)).clamp(min=0)


def relative_noise(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return s = sigma / alpha, at most `NOISIEST`, float64 [B]."""
    return sigma.double() / alpha.double().clamp(min=1 / NOISIEST)


def earlier(timesteps: Timesteps, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (timesteps, alpha, sigma) [B] of the levels with relative noise r; (0, 1, 0) where r is 0.

    On a diffusion path they are the nearest of its timesteps below t, and clean images below the first one.
    """
    at = timesteps.of_log_snr(-2 * r.log())
    clean = r <= 0
    if isinstance(timesteps.path, DiffusionPath):
        clean = clean | (t == 0)
        at = torch.minimum(at, t - 1).clamp(min=0)
    alpha, sigma = timesteps.scales(at)
    at = at.to(t.dtype).where(~clean, torch.zeros_like(t))
    return at, alpha.where(~clean, torch.ones_like(alpha)), sigma.where(~clean, torch.zeros_like(sigma))


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """Return sqrt(m + c^2) - c with the mean square m of each sample's difference, float32 [B].

    That is the loss of Song & Dhariwal 2024, eq. 7, divided by sqrt(D), for their constant c sqrt(D) and D values per
    sample. Its gradient is that of m / 2 weighted by 1 / sqrt(m + c^2), the adaptive weight of Geng et al. 2024.
    """
    return (difference.square().mean(dim=(1, 2, 3)) + c**2).sqrt() - c


def losses(
    network: nn.Module,
    timesteps: Timesteps,
    prediction: str,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    condition: Tensor | None,
    step: int,
    tuning: Tuning,
) -> Tensor:
    """Return the consistency loss of each sample at 0-based tuning `step`, float32 [B].

    pseudo_huber(f(x_t, t) - stopgrad f(x_r, r)) / (s - r), with equal noise, weights and dropout in both evaluations
    (Geng et al. 2024, algorithm 1).
    """
    alpha, sigma = timesteps.scales(t)
    s = relative_noise(alpha, sigma)
    at, alpha_r, sigma_r = earlier(timesteps, t, s * ratio(s, step, tuning))
    weights = 1 / (s - relative_noise(alpha_r, sigma_r))

    def f(at: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        alpha, sigma = alpha.float(), sigma.float()
        x = add_noise(x0, eps, alpha, sigma)
        return denoised(prediction, network(x, at, condition).float(), x, alpha, sigma)

    with torch.no_grad(), torch.random.fork_rng([x0.device] if x0.is_cuda else []):  # which resets the generators
        target = f(at, alpha_r, sigma_r)
    return weights.float() * pseudo_huber(f(t, alpha, sigma) - target, tuning.c)
