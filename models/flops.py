"""Floating-point operations: what a network needs and what a device achieves."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from models.optimization.adamw import leave_out_dynamo

CEILING_SIDE = {"cuda": 8192, "cpu": 1024}


def forward_flops(network: nn.Module, sample: Tensor, *inputs: Tensor | None) -> float:
    """Return the operations of one forward pass per sample: 2 for each multiply-add of the matrix products.

    Element-wise operations are not counted, as is usual for published utilisation. A training step needs three times as
    many, because the backward pass has two products for each one of the forward pass.

    Args:
        network: called with `sample` and `inputs`.
        sample: first input, [B, ...].
        inputs: the other inputs.
    """
    mode = getattr(flop_counter, "_FlopCounterMode", FlopCounterMode)  # the one that sees the operators
    leave_out_dynamo([getattr(mode, "__torch_dispatch__", None)])
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # the counter does not know the CPU's fused kernels
        network(sample, *inputs)
    return counter.get_total_flops() / len(sample)


def matmul_ceiling(device: torch.device, dtype: torch.dtype, repeats: int = 3) -> float:
    """Return the operations per second of a large square matrix product, the best of `repeats`.

    Utilisation is a fraction of this ceiling. Float32 is computed as `models.device.set_arithmetic` has set it.
    """
    side = CEILING_SIDE.get(device.type, 1024)
    # Random values: a GPU draws less power on constant ones, and is faster than it is in practice.
    random = torch.Generator(device).manual_seed(0)
    a = torch.randn(side, side, generator=random, device=device).to(dtype)
    best = float("inf")
    for _ in range(repeats + 1):  # the first one is a warm-up
        _synchronize(device)
        started = time.perf_counter()
        torch.mm(a, a)
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return float(2 * side**3 / best)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
