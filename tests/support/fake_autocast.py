"""Autocast on the device "cuda" of `tests/support/fake_cuda.py`, which PyTorch's own code takes for another device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    import pytest

LOWER = frozenset(
    [
        "linear",
        "matmul",
        "__matmul__",
        "mm",
        "bmm",
        "addmm",
        "addbmm",
        "baddbmm",
        "scaled_dot_product_attention",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
    ]
)
"""Functions that autocast computes in the lower precision."""
FLOAT32 = frozenset(
    [
        "exp",
        "expm1",
        "log",
        "log2",
        "log1p",
        "log10",
        "logsumexp",
        "pow",
        "__pow__",
        "reciprocal",
        "rsqrt",
        "softmax",
        "log_softmax",
        "softplus",
        "sum",
        "prod",
        "cumsum",
        "cumprod",
        "norm",
        "cosine_similarity",
        "layer_norm",
        "group_norm",
        "cross_entropy",
        "mse_loss",
        "l1_loss",
        "smooth_l1_loss",
        "huber_loss",
        "kl_div",
    ]
)
"""Functions that it computes in float32. Both lists follow the documentation of autocast and need not be complete."""


def patch_autocast(patch: pytest.MonkeyPatch) -> None:
    """Cast the arguments of functions on "cuda" as `torch.autocast("cuda")` does, within its blocks."""
    for owner in (torch, torch.Tensor, F):
        for name in sorted(LOWER | FLOAT32):
            if hasattr(owner, name):
                patch.setattr(owner, name, _casting(getattr(owner, name), lower=name in LOWER))


def _casting(function: Callable[..., Any], lower: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def cast(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled("cuda"):
            return function(*args, **kwargs)
        dtype = torch.get_autocast_dtype("cuda") if lower else torch.float32

        def converted(tensor: torch.Tensor) -> torch.Tensor:
            wanted = tensor.is_cuda and tensor.is_floating_point() and tensor.dtype != torch.float64
            return tensor.to(dtype) if wanted else tensor

        args, kwargs = tree_map_only(torch.Tensor, converted, (args, kwargs))
        with torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return cast
