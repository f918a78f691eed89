"""Tensors that FSDP2 (`fully_shard`) divides among processes: the part of this process, and the whole.

Every function returns other tensors as they are. `whole` exchanges data: all processes must call it, in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether `tensor` is a `DTensor`.

    Before its module is imported, which takes a second or more, there is none.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the parts of sharded tensors that this process holds; they share their memory."""
    with torch.no_grad():  # without it `to_local` is an operator
        return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor with all its rows."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def like(owner: Tensor, tensor: Tensor) -> Tensor:
    """Shard a tensor, of which every process has the whole, as `owner` is sharded; nothing is exchanged."""
    if not is_sharded(owner) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    on_device = tensor.to(owner.device).contiguous()
    return distribute_tensor(on_device, owner.device_mesh, owner.placements, src_data_rank=None)


def reshard(network: nn.Module) -> None:
    """Discard whole weights that a forward pass without a backward pass left: FSDP2 would use them again.

    Call it before and after sharded weights are replaced.
    """
    if (fsdp := sys.modules.get("torch.distributed.fsdp")) is None:
        return
    for module in network.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
