"""Whether the activations of a step are stored for its backward pass or computed again, by the device's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from models.networks import compilation
from tasks.training import stores

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tasks.training.batches import Batch
    from tasks.training.run import Run

SHARE = 0.8
"""Share of the free memory that activations, gradients and optimizer may take; buffers of operators need the rest."""
STATE_BYTES = 12
"""Bytes per trained parameter that the first step allocates: the gradient and both moments of AdamW, float32."""


def recomputed(run: Run) -> bool:
    """Return whether activations are computed again (gradient checkpointing), before the first step of a run.

    `train.gradient_checkpointing` decides. With 'auto' they are if those of one part of a batch do not fit: every
    process of a training decides alike, because processes that share a network must call its layers equally often.
    """
    if run.params.gradient_checkpointing != "auto":
        return run.params.gradient_checkpointing
    fixed, each = stored_bytes(lambda batch: run.objective(run.network, batch), run.network, run.held_out[0])
    trained = sum(parameter.numel() for parameter in run.network.parameters() if parameter.requires_grad)
    state = STATE_BYTES * trained / (run.accelerator.num_processes if run.sharded else 1)
    needed, free = fixed + each * run.batches.size + state, stores.free_memory(run.accelerator.device)
    too_large = torch.tensor([needed > SHARE * free], device=run.accelerator.device)
    decision = bool(run.accelerator.gather(too_large).any())
    if run.accelerator.is_main_process:
        done = "computed again in the backward pass" if decision else "stored"
        print(
            f"train: a step with stored activations needs {needed / 1e9:.1f} GB beside the weights, and "
            f"{free / 1e9:.1f} GB are free: they are {done}",
            flush=True,
        )
    return decision


def stored_bytes(forward: Callable[[Batch], Tensor], network: nn.Module, batch: Batch) -> tuple[int, int]:
    """Measure what a forward pass stores for the backward pass, as (fixed bytes, bytes for each sample).

    The fixed part are copies of weights in a lower precision. Two passes are compared, of one sample and of two.
    """
    one, two = (_stored(forward, network, batch.repeated(count)) for count in (1, 2))
    return 2 * one - two, two - one


def _stored(forward: Callable[[Batch], Tensor], network: nn.Module, batch: Batch) -> int:
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept = dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), compilation.without(network):
        losses = forward(batch)  # holds what is stored, so that no address occurs twice
    del losses
    return sum(kept.values())
