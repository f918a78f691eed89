"""The loss of averaged weights on held-out samples, which the history of a training run records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from models.ema import EMA
    from tasks.training.run import Run


def held_out_losses(run: Run) -> dict[str, float]:
    """Loss of each average on held-out samples, with the same noise and timesteps every time."""
    import torch

    losses = {}
    for name, average in run.averages.items():
        with torch.inference_mode(), averaged(run.network, average):
            parts = [run.objective(run.network, batch) for batch in run.held_out]
        losses[f"held_out_loss/{name}"] = torch.cat(parts).mean().item()
    return losses


@contextmanager
def averaged(network: torch.nn.Module, average: EMA) -> Iterator[None]:
    """Exchange the weights for an average of them, and training mode for evaluation, for the length of the block."""
    import torch

    parameters = average.followed
    trained = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        torch._foreach_copy_(parameters, average.weights)
    network.eval()
    try:
        yield
    finally:
        network.train()
        with torch.no_grad():
            torch._foreach_copy_(parameters, trained)
