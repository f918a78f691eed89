"""Compilation of the network by torch.compile: whether, in which pieces, and for how many shapes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

    from tasks.params import TrainParams

LARGE = 100_000_000
"""Parameters from which a network is compiled block by block, so that blocks of equal shapes are compiled once."""
BLOCKS = {"ResnetBlock", "Attention", "ResnetBlock2D", "BasicTransformerBlock", "Block", "TextBlock"}
"""Classes of the repeated blocks: of our U-Net, of diffusers' U-Nets, and of the transformers."""
VARIANTS = 8
"""Compilations of one piece per shape: with and without gradient, training and evaluation, what is trained."""


def wanted(params: TrainParams) -> bool:
    """Whether the network is compiled on this machine; `train.compile` 'gpu' is false on a CPU."""
    return params.compile is True or (params.compile == "gpu" and torch.cuda.is_available())


def compiled(
    module: nn.Module, network: nn.Module, shapes: int, backend: str = "inductor", large: int = LARGE
) -> nn.Module:
    """Compile a network for training and return the module to call.

    Each shape is compiled for itself (`dynamic=False`): by default the second shape makes one slower graph for all
    shapes, and the ninth none.

    Args:
        module: `network` as accelerate wraps it.
        network: the network; from `large` parameters on its blocks are compiled in place.
        shapes: number of shapes of the batches, that is of buckets.
        backend: that of torch.compile.
        large: see `LARGE`.
    """
    count = sum(parameter.numel() for parameter in network.parameters())
    blocks = repeated_blocks(network) if count >= large else []
    allow_compilations(VARIANTS * shapes * max(1, len(blocks)))
    for block in blocks:
        block.compile(dynamic=False, backend=backend)
    if blocks:
        return module
    # torch.compile is declared for functions; for a module it returns a module.
    return torch.compile(module, dynamic=False, backend=backend)  # type: ignore[return-value]


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the outermost blocks of the classes `BLOCKS`, in the order of the network."""
    found: list[nn.Module] = []
    for child in network.children():
        # FSDP2 derives the class of a block that it shards from the original one.
        known = any(kind.__name__ in BLOCKS for kind in type(child).__mro__)
        found += [child] if known else repeated_blocks(child)
    return found


def allow_compilations(count: int) -> None:
    """Raise torch's limits, beyond which it runs without compiling; they count all blocks and shapes together."""
    config = torch._dynamo.config  # imported here, by torch: a second that a training without compilation saves
    config.recompile_limit = max(config.recompile_limit, count)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, count)


def without(network: nn.Module) -> AbstractContextManager[object]:
    """Return a context in which compiled blocks run as they are: previews and held-out losses have other shapes."""
    if any(module._compiled_call_impl is not None for module in network.modules()):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()
