"""Exponential and power-law moving averages of the weights, which samples are drawn from.

A profile defines how fast an average forgets, and is named by its one number:

- `decay-0.999`: w <- 0.999 w + 0.001 theta, with a smaller decay during the first steps;
- `std-0.10`: a power law (Karras et al. 2024, section 3.1) of relative width 0.10, so that the memory is proportional
  to the length of the run and the number fits runs of any length;
- `gamma-6.94`: the same power law, named by its exponent.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from models.optimization import sharding

WIDEST_STD = 12**-0.5
"""The relative width of the plain mean of all weights so far (gamma = 0); no power law is wider."""


def decay_at(step: int, profile: str, steps: int = 1) -> float:
    """Return the decay of an update after `step` (1-based) for a named profile, `steps` after the update before.

    `decay-b`: min(b, (1 + s) / (10 + s)). Power law: (1 - 1/s)^(gamma + 1) (Karras et al. 2024, eq. 2). That of several
    steps is the product of theirs, so that older weights count as much as if every step had an update.

    Raises:
        ValueError: for another name.
    """
    gamma = gamma_of(profile)
    if gamma is not None:
        return power_law(step, gamma, steps)
    kind, _, number = profile.partition("-")
    if kind == "decay":
        return math.prod(min(float(number), (1 + s) / (10 + s)) for s in range(step - steps + 1, step + 1))
    raise ValueError(f"unknown average {profile!r}; known: decay-0.999, std-0.10, gamma-6.94")


def gamma_of(profile: str) -> float | None:
    """Return the exponent of a named power law; None for a profile of another kind."""
    kind, _, number = profile.partition("-")
    if kind == "std":
        return gamma_of_std(float(number))
    return float(number) if kind == "gamma" else None


def power_law(step: int, gamma: float, steps: int = 1) -> float:
    """Return beta_gamma(t) = (1 - 1/t)^(gamma + 1) for t = `step` >= 1 (Karras et al. 2024, eq. 2).

    The product of `steps` decays up to t is (1 - steps/t)^(gamma + 1).
    """
    return float((1 - steps / step) ** (gamma + 1))


def gamma_of_std(std: float) -> float:
    """Return the exponent of the profile with the relative width `std`, 0 < std < `WIDEST_STD`.

    Inverts sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2) (Karras et al. 2024, eq. 3): the result is
    the largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / std^2.
    """
    inverse = std**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class EMA:
    """Averages, float32, of the trainable parameters of a module, by one `profile`.

    `followed` are the module's own parameters and `weights` their averages, in the order of `names`. Averages of
    parameters that FSDP2 shards are sharded likewise.
    """

    def __init__(self, module: nn.Module, profile: str) -> None:
        self.profile = profile
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.names = list(trained)
        self.followed: list[Tensor] = list(trained.values())
        self.weights = [parameter.detach().float().clone() for parameter in self.followed]

    @torch.no_grad()
    def update(self, step: int, steps: int = 1) -> None:
        """Set weights <- decay * weights + (1 - decay) * parameters after `step` (1-based), in one fused call.

        `steps` is the number of steps since the update before.
        """
        parameters = [parameter.float() for parameter in sharding.local(self.followed)]
        torch._foreach_lerp_(sharding.local(self.weights), parameters, 1 - decay_at(step, self.profile, steps))

    @torch.no_grad()
    def copy_to_module(self) -> None:
        """Replace the module's parameters by the averages."""
        torch._foreach_copy_(sharding.local(self.followed), sharding.local(self.weights))

    @torch.no_grad()
    def start_anew(self) -> None:
        """Replace the averages by the module's parameters."""
        torch._foreach_copy_(sharding.local(self.weights), sharding.local(self.followed))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name; those of sharded parameters are sharded."""
        return dict(zip(self.names, self.weights, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy averages in place.

        Raises:
            KeyError: if a name is missing.
        """
        for name, weight in zip(self.names, self.weights, strict=True):
            weight.copy_(sharding.like(weight, state[name]))
