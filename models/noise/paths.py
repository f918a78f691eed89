"""Paths from images to noise: x_t = alpha_t x_0 + sigma_t eps, for the diffusion schedules and for rectified flow.

Everything else follows from (alpha, sigma): the signal-to-noise ratio SNR = (alpha / sigma)^2, what a network predicts
and how that converts to x_0, the loss weights, and the steps of the samplers. The ONNX bundle contains a copy of this
file, so it imports only NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Number: TypeAlias = Any  # a float, a NumPy array or a torch tensor; the three have no common type
AlphaBar: TypeAlias = "Sequence[float] | np.ndarray"

RECTIFIED_FLOW = "rectified_flow"
"""The name of that path among the noise schedules."""
FLOW_PREDICTION = "flow_prediction"
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", FLOW_PREDICTION)
"""What a network can predict, under diffusers' names."""


MIDDLE = 0.821
"""Relative noise of the second of two steps of a consistency model (Geng et al. 2024, for CIFAR-10)."""


class Level(NamedTuple):
    """One noise level of a path."""

    t: float
    """The timestep that the network receives: an int on a diffusion path, a float on a rectified flow."""
    alpha: float
    """Scale of x_0."""
    sigma: float
    """Scale of the noise."""

    @property
    def log_snr(self) -> float:
        """log(alpha^2 / sigma^2); -inf for pure noise, inf for a clean image."""
        if self.alpha == 0:
            return -math.inf
        return 2 * math.log(self.alpha / self.sigma) if self.sigma > 0 else math.inf

    @property
    def signal(self) -> float:
        """Share of the signal in the variance, alpha^2 / (alpha^2 + sigma^2); on a diffusion path alpha_bar."""
        return self.alpha**2 / (self.alpha**2 + self.sigma**2)

    @property
    def relative_noise(self) -> float:
        """Noise relative to an image in [-1, 1], sigma / alpha; inf for pure noise."""
        return self.sigma / self.alpha if self.alpha > 0 else math.inf


CLEAN = Level(0, 1.0, 0.0)
"""The end of every sampling."""


@dataclass(frozen=True)
class DiffusionPath:
    """The variance-preserving path of a noise schedule: alpha = sqrt(alpha_bar_t), sigma = sqrt(1 - alpha_bar_t).

    Ho et al. 2020, eq. 4.
    """

    alpha_bar: AlphaBar
    """float [T], decreasing."""

    @property
    def timesteps(self) -> int:
        """T; timesteps are the integers 0..T-1."""
        return len(self.alpha_bar)

    def level(self, t: float) -> Level:
        """Return the noise level of the integer timestep `t`."""
        a = float(self.alpha_bar[int(t)])
        return Level(int(t), math.sqrt(a), math.sqrt(1 - a))

    def spread(self, count: int) -> list[float]:
        """Return at most `count` increasing timesteps over the whole path, without those that are pure noise."""
        noisy = int((np.asarray(self.alpha_bar) > 0).sum())
        return sorted({round(t) for t in np.linspace(0, noisy - 1, min(count, noisy))})


@dataclass(frozen=True)
class RectifiedFlow:
    """The straight path alpha = 1 - sigma, sigma = t / T for t in (0, T] (Liu et al. 2023; Lipman et al. 2023)."""

    timesteps: int = 1000
    """T, the timestep of pure noise: the network receives T sigma."""
    shift: float = 1.0
    """Samplers take the noise levels s sigma / (1 + (s - 1) sigma) (Esser et al. 2024, eq. 23); 1 changes none."""

    def level(self, t: float) -> Level:
        """Return the noise level of timestep `t`."""
        return self.of_sigma(t / self.timesteps)

    def of_sigma(self, sigma: float) -> Level:
        """Return the noise level with this sigma, in [0, 1]."""
        return Level(self.timesteps * sigma, 1 - sigma, sigma)

    def sampled(self, steps: int) -> list[Level]:
        """Return `steps` noise levels from pure noise down: 1 - i / steps, shifted.

        Raises:
            ValueError: if `steps` is not positive.
        """
        if steps < 1:
            raise ValueError(f"sampling steps {steps} must be at least 1")
        even = [1 - i / steps for i in range(steps)]
        return [self.of_sigma(self.shift * sigma / (1 + (self.shift - 1) * sigma)) for sigma in even]

    def spread(self, count: int) -> list[float]:
        """Return `count` increasing timesteps over the whole path, without its ends (clean image and pure noise)."""
        return [round(t, 6) for t in np.linspace(0, self.timesteps, count + 2)[1:-1].tolist()]


Path: TypeAlias = DiffusionPath | RectifiedFlow


def consistency_levels(path: Path, steps: int) -> list[Level]:
    """Return the noise levels of a consistency model: pure noise, then relative noise m (n - i) / i for i = 1..n - 1.

    n is `steps`. These are evenly spaced in s / (s + m), and the second of two has m = `MIDDLE`; on a rectified flow
    m is `shift` times that. A diffusion path has them at the nearest of its timesteps.

    Raises:
        ValueError: if `steps` is not positive, or exceeds the timesteps of a diffusion path.
    """
    inner = [MIDDLE * (steps - i) / i for i in range(1, steps)]
    if isinstance(path, RectifiedFlow):
        return path.sampled(min(steps, 1)) + [path.of_sigma(path.shift * s / (1 + path.shift * s)) for s in inner]
    if not 1 <= steps <= path.timesteps:
        raise ValueError(f"sampling steps {steps} must lie between 1 and the model's {path.timesteps} timesteps")
    a = np.asarray(path.alpha_bar, dtype=np.float64)
    with np.errstate(divide="ignore"):
        log_noise = 0.5 * (np.log1p(-a) - np.log(a))
    nearest = [int(np.abs(log_noise - math.log(s)).argmin()) for s in inner]
    return [path.level(t) for t in (path.timesteps - 1, *nearest)]


def coefficients(prediction: str, alpha: Number, sigma: Number) -> tuple[Number, Number]:
    """Return (c, d): the network predicts c x_0 + d eps.

    `epsilon`: eps (Ho et al. 2020). `sample`: x_0. `v_prediction`: v = alpha eps - sigma x_0 (Salimans & Ho 2022,
    section 4). `flow_prediction`: the velocity eps - x_0 of the straight path (Liu et al. 2023, eq. 1).

    Raises:
        ValueError: for another prediction type.
    """
    known = {"epsilon": (0.0, 1.0), "sample": (1.0, 0.0), "v_prediction": (-sigma, alpha), FLOW_PREDICTION: (-1.0, 1.0)}
    if prediction not in known:
        raise ValueError(f"unknown prediction {prediction!r}; known: {', '.join(PREDICTION_TYPES)}")
    return known[prediction]


def to_x0(prediction: str, output: Number, x: Number, level: Level) -> Number:
    """Convert the network output at x = alpha x_0 + sigma eps to x_0, by eliminating eps.

    Raises:
        ValueError: for another prediction type, and for `epsilon` in pure noise, where x_t is the noise itself.
    """
    if prediction == "sample":
        return output
    if prediction == "epsilon" and level.alpha == 0:
        raise ValueError(f"{prediction} prediction is undefined at alpha_bar 0, pure noise; train with another one")
    return eliminated(prediction, output, x, level.alpha, level.sigma)


def eliminated(prediction: str, output: Number, x: Number, alpha: Number, sigma: Number) -> Number:
    """Solve output = c x_0 + d eps and x = alpha x_0 + sigma eps for x_0, with (c, d) of `coefficients`.

    Raises:
        ValueError: for another prediction type.
    """
    of_x0, of_eps = coefficients(prediction, alpha, sigma)
    return (of_eps * x - sigma * output) / (of_eps * alpha - of_x0 * sigma)


def error_scale(prediction: str, snr: Number, alpha: Number, sigma: Number) -> Number:
    """Return the factor between the squared error of the network output and that of x_0.

    For a fixed x_t an error e of x_0 is an error -sqrt(SNR) e of eps, hence one of (c - d sqrt(SNR)) e of the output:
    SNR for eps, 1 for x_0, SNR + 1 for v, and (1 + sqrt(SNR))^2 for the velocity.
    """
    of_x0, of_eps = coefficients(prediction, alpha, sigma)
    return (of_x0 - of_eps * snr**0.5) ** 2
