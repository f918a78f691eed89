"""Forward and backward pass of a batch: as a whole, or on a CPU in parts that several threads work on at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch

from models import parallel

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

    from models.parallel import Workers
    from tasks.params import ModelParams, TrainParams
    from tasks.training.batches import Batch
    from tasks.training.run import LossFunction

Backward: TypeAlias = "Callable[[LossFunction, Batch], Tensor]"
"""(objective, batch) -> loss of each sample, float32 [B]; adds the gradient of their mean to the parameters."""


def workers_for(model: ModelParams, params: TrainParams, processes: int) -> int:
    """Return the number of threads among which a batch is split; 1 is no split.

    One for each thread of PyTorch, as long as each gets 16 images (`parallel.LEAST_IMAGES`). The digits network (0.69
    M), forward and backward of 64 images: 118 ms with two threads in each operator, 70 ms as two halves. The work is
    the same for every size of network, and each worker's own gradient is small beside the activations of 16 images.

    A batch is not split on a GPU, between processes, with dropout (whose random numbers would depend on the order of
    the threads), in a compiled network, or in fp16. Gradient checkpointing changes nothing: the parts have the same
    bytes with activations that are stored and computed again, and `auto`, which decides by the free memory, may decide
    otherwise when a run continues.
    """
    whole = model.dropout > 0 or params.compile is True or params.precision == "fp16"
    if torch.cuda.is_available() or processes > 1 or whole:
        return 1
    return parallel.workers_for(params.batch_size // params.gradient_accumulation)


class WholeBatch:
    """The pass of a whole batch, by accelerate."""

    def __init__(self, accelerator: Accelerator, module: nn.Module) -> None:
        self.accelerator, self.module = accelerator, module

    def __call__(self, objective: LossFunction, batch: Batch) -> Tensor:
        with self.accelerator.autocast():
            losses = objective(self.module, batch)
        self.accelerator.backward(losses.mean())
        return losses


class SplitBatch:
    """The passes of as many parts of a batch at once as there are `workers`; gradients are added in the parts' order.

    The same number of workers and threads gives the same bytes.
    """

    def __init__(self, accelerator: Accelerator, module: nn.Module, workers: Workers) -> None:
        self.accelerator, self.module, self.workers = accelerator, module, workers

    def __call__(self, objective: LossFunction, batch: Batch) -> Tensor:
        parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        count = len(batch.t)
        scale = 1 / (count * self.accelerator.gradient_accumulation_steps)

        def passes(part: Batch) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            with self.accelerator.autocast():
                losses = objective(self.module, part)
            return losses.detach(), torch.autograd.grad(losses.sum() * scale, parameters, allow_unused=True)

        results = self.workers.map(passes, batch.split(-(-count // self.workers.count)))
        for parameter, *gradients in zip(parameters, *(gradients for _, gradients in results), strict=True):
            for gradient in gradients:
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return torch.cat([losses for losses, _ in results])
