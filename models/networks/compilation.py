"""Compilation of the network by torch.compile: whether, in which pieces, and for how many shapes."""

from __future__ import annotations

import copy
import os
import shutil
import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

import torch
from torch import nn

from models.device import devices_of, placed
from models.networks.text_unet import TextUNet

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from models.pipeline import Pipeline

Setting: TypeAlias = "bool | Literal['gpu']"
"""`train.compile` and `evaluate.compile`."""
Network = TypeVar("Network", bound=nn.Module)

LARGE = 100_000_000
"""Parameters from which a network is compiled block by block, so that blocks of equal shapes are compiled once."""
BLOCKS = {"ResnetBlock", "Attention", "ResnetBlock2D", "BasicTransformerBlock", "Block", "TextBlock"}
"""Classes of the repeated blocks: of our U-Net, of diffusers' U-Nets, and of the transformers."""
VARIANTS = 8
"""Compilations of one piece per shape: with and without gradient, training and evaluation, what is trained; in a
pipeline the network, its companions, and each of them with a ControlNet."""
SHAPES = 2
"""Batches that the network of a pipeline sees: the whole one, and with classifier-free guidance twice that."""


def wanted(setting: Setting) -> bool:
    """Whether the network is compiled on this machine; 'gpu' is false on a CPU."""
    return setting is True or (setting == "gpu" and torch.cuda.is_available())


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which the code for a CPU and the launchers of kernels need."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


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
    blocks = large_blocks(network, large)
    allow_compilations(VARIANTS * shapes * max(1, len(blocks)))
    for block in blocks:
        block.compile(dynamic=False, backend=backend)
    if blocks:
        return module
    # torch.compile is declared for functions; for a module it returns a module.
    return torch.compile(module, dynamic=False, backend=backend)  # type: ignore[return-value]


def large_blocks(network: nn.Module, large: int) -> list[nn.Module]:
    """Return the blocks that are compiled one by one: none of a network with fewer than `large` parameters."""
    count = sum(parameter.numel() for parameter in network.parameters())
    return repeated_blocks(network) if count >= large else []


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


@dataclass(frozen=True)
class Compiler:
    """Compiles the networks that a pipeline draws with, one copy for each device.

    The copies share the weights of the original, which stays uncompiled. A further thread draws with each further GPU;
    torch's limits on the number of compilations belong to a thread, so each calls `allow`.
    """

    backend: str = "inductor"
    """That of torch.compile."""
    large: int = LARGE
    """See `LARGE`."""
    copies: weakref.WeakKeyDictionary[nn.Module, dict[str, nn.Module]] = field(
        default_factory=weakref.WeakKeyDictionary, repr=False
    )
    """Original or compiled network -> its compiled copies by device, which are compiled once and not at every draw."""

    def on(self, network: Network, device: str) -> Network:
        """Return the compiled copy of `network` on `device`; for a compiled network on its own device, itself."""
        known = self.copies.setdefault(network, {})
        if device not in known:
            moved = placed(network, device)
            if moved is network and any(piece._compiled_call_impl is not None for piece in self.pieces(network)):
                return network
            known[device] = self._compiled(_sharing(moved) if moved is network else moved)
        return known[device]  # type: ignore[return-value]  # a copy of the same class

    def pieces(self, network: nn.Module) -> list[nn.Module]:
        """Return the modules that are compiled one by one: the network, or its blocks where it is large."""
        # A ControlNet's outputs are given to the network within a `TextUNet`, see `controlnet.controlled`.
        whole = network.network if isinstance(network, TextUNet) else network
        return large_blocks(network, self.large) or [whole]

    def allow(self, network: nn.Module, device: str) -> None:
        """Raise torch's limits for this thread, see `allow_compilations`, to what drawing with `network` needs."""
        allow_compilations(VARIANTS * SHAPES * len(devices_of(device)) * len(self.pieces(network)))

    def _compiled(self, network: nn.Module) -> nn.Module:
        for piece in self.pieces(network):
            piece.compile(dynamic=False, backend=self.backend)
        return network


def compiled_pipeline(pipeline: Pipeline, backend: str = "inductor", large: int = LARGE) -> Pipeline:
    """Return the pipeline with compiled networks, companions and ControlNet; `pipeline` stays as it is.

    It draws in batches of one shape: rows are added to the last one, see `in_whole_batches`. Autoencoder and text
    encoder are not compiled.
    """
    compiler, device = Compiler(backend, large), pipeline.device
    return replace(
        pipeline,
        network=compiler.on(pipeline.network, device),
        companions={name: compiler.on(network, device) for name, network in pipeline.companions.items()},
        control=None if pipeline.control is None else compiler.on(pipeline.control, device),
        compiler=compiler,
    )


def in_whole_batches(network: Callable[..., Tensor], rows: int | None) -> Callable[..., Tensor]:
    """Return a function that calls a network with exactly `rows` rows, of which the last ones repeat the last one.

    A compiled network would otherwise be compiled again for the last, smaller batch. None changes nothing.
    """
    if rows is None:
        return network

    def padded(*inputs: Tensor | None) -> Tensor:
        given = next(len(each) for each in inputs if each is not None)
        return network(*(each if each is None else _padded(each, rows) for each in inputs))[:given]

    return padded


def _padded(rows: Tensor, count: int) -> Tensor:
    """Return `count` rows, in memory always of the same kind: a graph is also bound to strides and inference mode."""
    if missing := count - len(rows):
        rows = torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])
    rows = rows.contiguous()
    return rows.clone() if torch.is_inference_mode_enabled() and not rows.is_inference() else rows


def _sharing(network: Network) -> Network:
    """Return a copy of the modules with the same weights."""
    tensors = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
