"""The optimizer of a training: built from parameters, and its state in a checkpoint.

The state is named by parameter, `<name of the parameter>/<quantity>`, so that it does not depend on the groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from models.optimization import sharding
from models.optimization.muon import MuonWithAdamW

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from tasks.params import TrainParams


def build(network: nn.Module, params: TrainParams) -> Optimizer:
    """Build the optimizer `train.optimizer` of a network.

    The learning rate of each group at its peak is its `initial_lr`, as in torch's schedulers.

    Raises:
        ValueError: for Muon, if no parameter is a hidden matrix.
    """
    optimizer: Optimizer
    if params.optimizer == "muon":
        optimizer = MuonWithAdamW(
            network,
            lr=params.muon_learning_rate,
            adamw_lr=params.learning_rate,
            momentum=params.muon_momentum,
            weight_decay=params.weight_decay,
        )
    else:
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay, fused=True
        )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def state_of(network: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the state of the optimizer by parameter and quantity; parameters without a step have none."""
    names = _names(network, optimizer)
    state = optimizer.state_dict()["state"]
    return {f"{names[i]}/{key}": value for i, slots in state.items() for key, value in slots.items()}


def restore(network: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load the state that `state_of` returned into the optimizer of a network that was just built."""
    state: dict[int, dict[str, Tensor]] = {}
    parameters, indices = dict(network.named_parameters()), {n: i for i, n in enumerate(_names(network, optimizer))}
    for name, value in tensors.items():
        owner, key = name.rsplit("/", 1)
        parameter = parameters[owner]
        if value.shape == parameter.shape:  # in the parameter's memory format, as the fused step expects
            value = sharding.like(parameter, value)
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value).detach()
        state.setdefault(indices[owner], {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _names(network: nn.Module, optimizer: Optimizer) -> list[str]:
    """Return the names of the optimizer's parameters, in the order in which its `state_dict` numbers them."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
