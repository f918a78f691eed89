"""Exponential moving average of the weights, which is what samples are drawn from."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def decay_at(step: int, decay: float) -> float:
    """Decay of the update after `step` (1-based): short memory at first, min(decay, (1 + s) / (10 + s))."""
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """Averaged float32 copies of a module's parameters, under their names."""

    def __init__(self, module: nn.Module) -> None:
        self.names = [name for name, _ in module.named_parameters()]
        self.weights = [parameter.detach().float().clone() for parameter in module.parameters()]

    @torch.no_grad()
    def update(self, module: nn.Module, decay: float) -> None:
        """weights <- decay * weights + (1 - decay) * parameters, in one fused call."""
        torch._foreach_lerp_(self.weights, [parameter.float() for parameter in module.parameters()], 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.weights, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy averaged weights in place. Raises `KeyError` when a name is missing."""
        for name, weight in zip(self.names, self.weights, strict=True):
            weight.copy_(state[name])
