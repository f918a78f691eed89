"""The optimizer of a training: built from parameters, and its state in a checkpoint.

The state is named by parameter, `<name of the parameter>/<quantity>`, so that it does not depend on the groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from models.optimization import sharding
from models.optimization.adamw import AdamW
from models.optimization.muon import MuonWithAdamW

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from tasks.params import TrainParams
    from tasks.training.run import Run


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
        optimizer = AdamW(network.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def clip_gradients(run: Run) -> Tensor:
    """Scale the gradients down to the norm `train.clip_norm` if theirs is larger; returns the norm before, float [].

    accelerate's own function imports torch.distributed.tensor, which takes seconds that only FSDP2 needs.
    """
    accelerator, limit = run.accelerator, run.params.clip_norm
    if run.sharded:
        return sharding.whole(accelerator.clip_grad_norm_(run.module.parameters(), limit))
    accelerator.unscale_gradients()
    return torch.nn.utils.clip_grad_norm_(run.module.parameters(), limit)


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
