"""The loss of weight averages on held-out samples, for the history of a training run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from models.networks import compilation
from models.optimization import sharding
from tasks.training import tuning

if TYPE_CHECKING:
    from torch import Tensor

    from models.optimization.ema import EMA
    from tasks.training.batches import Batch
    from tasks.training.run import Run


def held_out_losses(run: Run) -> dict[str, float]:
    """Return weight average -> loss on held-out samples, with the same noise and timesteps at every call."""
    losses, objective = {}, tuning.objective_at(run, run.step - 1)

    @torch.inference_mode()
    def measured(batch: Batch) -> Tensor:
        return objective(run.network, batch)

    for name, average in run.averages.items():
        with averaged(run.network, average):
            losses[name] = torch.cat(run.workers.map(measured, run.held_out)).mean().item()
    return losses


@contextmanager
def averaged(network: torch.nn.Module, average: EMA) -> Iterator[None]:
    """Replace the weights by an average of them, and training mode by evaluation, within the block."""
    parameters = sharding.local(average.followed)
    trained = [parameter.detach().clone() for parameter in parameters]
    sharding.reshard(network)
    average.copy_to_module()
    network.eval()
    try:
        with compilation.without(network):
            yield
    finally:
        network.train()
        sharding.reshard(network)
        with torch.no_grad():
            torch._foreach_copy_(parameters, trained)
