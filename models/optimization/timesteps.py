"""Where on its path training draws timesteps, and the loss weights there, on torch tensors.

A density over the path is one half of the weight that each noise level has in the training objective, and the loss
weighting is the other (Kingma & Gao 2023, section 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.noise.paths import DiffusionPath, Path
from models.optimization.diffusion import loss_weights

DENSITIES = ("uniform", "logit_normal", "normal_log_snr")


@dataclass(frozen=True)
class Density:
    """The distribution of training timesteps.

    `uniform`: every timestep is equally likely. `logit_normal`: t / T = sigmoid(z), z ~ N(mean, std^2) (Esser et al.
    2024, eq. 19). `normal_log_snr`: log SNR ~ N(mean, std^2), as in Karras et al. 2022, section 5, whose log sigma is
    -log SNR / 2.
    """

    kind: str = "uniform"
    """One of `DENSITIES`."""
    mean: float = 0.0
    """Mean of the normal distribution; not read by `uniform`."""
    std: float = 1.0
    """Standard deviation of the normal distribution, above 0; not read by `uniform`."""
    shift: float = 1.0
    """Move every drawn log SNR by -2 log(shift): above 1 towards noise, for higher resolutions (Hoogeboom et al. 2023,
    section 3.1; on a rectified flow Esser et al. 2024, eq. 23)."""


class Timesteps:
    """Timesteps of a path as tensors on a device: drawing them, and the noise levels and loss weights there.

    Raises:
        ValueError: for an unknown density.
    """

    def __init__(self, path: Path, device: torch.device, density: Density | None = None) -> None:
        self.path, self.device, self.density = path, device, density or Density()
        if self.density.kind not in DENSITIES:
            raise ValueError(f"unknown density {self.density.kind!r}; known: {', '.join(DENSITIES)}")
        self._alpha_bar: Tensor | None = None
        if isinstance(path, DiffusionPath):
            levels = torch.from_numpy(np.asarray(path.alpha_bar, dtype=np.float64))
            self._alpha_bar = levels.to(device)
            self._negative_log_snr = ((1 - levels).log() - levels.log()).to(device)  # increasing

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw timesteps [count]: int64 in 0..T-1 on a diffusion path, float32 in [0, T] on a rectified flow."""
        density = self.density
        if density.kind == "normal_log_snr":
            normal = torch.randn(count, generator=generator, device=self.device)
            return self._shifted(self.of_log_snr(density.mean + density.std * normal))
        if density.kind == "logit_normal":
            normal = torch.randn(count, generator=generator, device=self.device)
            share = torch.sigmoid(density.mean + density.std * normal)
        else:
            share = torch.rand(count, generator=generator, device=self.device)
        t = share * self.path.timesteps
        return self._shifted(t if self._alpha_bar is None else t.long().clamp(max=self.path.timesteps - 1))

    def _shifted(self, t: Tensor) -> Tensor:
        if self.density.shift == 1:
            return t
        return self.of_log_snr(self.log_snr(t) - 2 * math.log(self.density.shift))

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log SNR at timesteps, float [B]; inf for a clean image and -inf for pure noise."""
        if self._alpha_bar is not None:
            return -self._negative_log_snr[t]
        alpha, sigma = self.scales(t)
        return 2 * (alpha.log() - sigma.log())

    def of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the timesteps at which the path has these log SNRs, [B]; the nearest of a diffusion path's."""
        if self._alpha_bar is None:
            return torch.sigmoid(-log_snr / 2) * self.path.timesteps
        above = torch.searchsorted(self._negative_log_snr, -log_snr.to(self._negative_log_snr.dtype))
        above = above.clamp(1, self.path.timesteps - 1)
        below = above - 1
        distances = [(self._negative_log_snr[t] + log_snr).abs() for t in (below, above)]
        return torch.where(distances[0] <= distances[1], below, above)

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma) at timesteps: float64 [B] each on a diffusion path, float32 on a rectified flow."""
        if self._alpha_bar is not None:
            a = self._alpha_bar[t]
            return a.sqrt(), (1 - a).sqrt()
        sigma = t / self.path.timesteps
        return 1 - sigma, sigma

    def weights(self, t: Tensor, weighting: str, prediction: str, gamma: float) -> Tensor:
        """Return the loss weights at timesteps, float32 [B]; see `diffusion.loss_weights`."""
        return loss_weights(weighting, prediction, *self.scales(t), gamma).float()
