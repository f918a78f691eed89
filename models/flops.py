"""What a network costs and what a device can do, in floating-point operations."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

CEILING_SIDE = {"cuda": 8192, "cpu": 1024}


def forward_flops(network: nn.Module, *inputs: Tensor | None) -> float:
    """Operations of one forward pass for each sample of a batch: 2 for every multiply-add of its matrix products.

    Element-wise work is not counted, as in every published utilisation. A training step does three times as many:
    its backward pass has two products for each of the forward pass.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # the fused kernels of the CPU are not counted
        network(*inputs)
    first: Any = inputs[0]
    return counter.get_total_flops() / len(first)


def matmul_ceiling(device: torch.device, dtype: torch.dtype, repeats: int = 3) -> float:
    """Operations per second of a large square matrix product, the best of `repeats`: what utilisation is a share of."""
    side = CEILING_SIDE.get(device.type, 1024)
    # Random: of equal numbers a GPU draws less power and is faster than it ever is on real ones.
    random = torch.Generator(device).manual_seed(0)
    a = torch.randn(side, side, generator=random, device=device).to(dtype)
    best, precision = float("inf"), torch.get_float32_matmul_precision()
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        torch.set_float32_matmul_precision("high")  # as convolutions have it: TF32 in the place of float32
    for _ in range(repeats + 1):  # the first one also wakes the library up
        _wait(device)
        started = time.perf_counter()
        torch.mm(a, a)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    torch.set_float32_matmul_precision(precision)
    return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
