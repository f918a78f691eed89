"""Exponential and power-law moving averages of the weights, which samples are drawn from.

A profile defines how fast an average forgets, and is named by its one number:

- `decay-0.999`: w <- 0.999 w + 0.001 theta, with a smaller decay during the first steps;
- `std-0.10`: a power law (Karras et al. 2024, section 3.1) of relative width 0.10, so that the memory is proportional
  to the length of the run and the number fits runs of any length;
- `gamma-6.94`: the same power law, named by its exponent.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

WIDEST_STD = 12**-0.5
"""The relative width of the plain mean of all weights so far (gamma = 0); no power law is wider."""


def decay_at(step: int, profile: str) -> float:
    """Return the decay of the update after `step` (1-based) for a named profile.

    `decay-b`: min(b, (1 + s) / (10 + s)). Power law: (1 - 1/s)^(gamma + 1) (Karras et al. 2024, eq. 2).

    Raises:
        ValueError: for another name.
    """
    gamma = gamma_of(profile)
    if gamma is not None:
        return power_law(step, gamma)
    kind, _, number = profile.partition("-")
    if kind == "decay":
        return min(float(number), (1 + step) / (10 + step))
    raise ValueError(f"unknown average {profile!r}; known: decay-0.999, std-0.10, gamma-6.94")


def gamma_of(profile: str) -> float | None:
    """Return the exponent of a named power law; None for a profile of another kind."""
    kind, _, number = profile.partition("-")
    if kind == "std":
        return gamma_of_std(float(number))
    return float(number) if kind == "gamma" else None


def power_law(step: int, gamma: float) -> float:
    """Return beta_gamma(t) = (1 - 1/t)^(gamma + 1) for t = `step` >= 1 (Karras et al. 2024, eq. 2)."""
    return float((1 - 1 / step) ** (gamma + 1))


def gamma_of_std(std: float) -> float:
    """Return the exponent of the profile with the relative width `std`, 0 < std < `WIDEST_STD`.

    Inverts sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2) (Karras et al. 2024, eq. 3): the result is
    the largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / std^2.
    """
    inverse = std**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class EMA:
    """Averages, float32, of the trainable parameters of a module, by one `profile`.

    `followed` are the module's own parameters and `weights` their averages, in the order of `names`.
    """

    def __init__(self, module: nn.Module, profile: str) -> None:
        self.profile = profile
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.names = list(trained)
        self.followed: list[Tensor] = list(trained.values())
        self.weights = [parameter.detach().float().clone() for parameter in self.followed]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Set weights <- decay * weights + (1 - decay) * parameters after `step` (1-based), in one fused call."""
        parameters = [parameter.float() for parameter in self.followed]
        torch._foreach_lerp_(self.weights, parameters, 1 - decay_at(step, self.profile))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name."""
        return dict(zip(self.names, self.weights, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy averages in place.

        Raises:
            KeyError: if a name is missing.
        """
        for name, weight in zip(self.names, self.weights, strict=True):
            weight.copy_(state[name])
