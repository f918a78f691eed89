"""The two outputs of classifier-free guidance from one call of the network, with twice the batch."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING

import torch
from torch import nn

from models.networks.compilation import in_whole_batches
from models.networks.precision import predictor

if TYPE_CHECKING:
    from torch import Tensor

_TOO_LARGE: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
"""Network -> the fewest values of x for which the memory did not suffice for twice the batch."""


def joins(device: str) -> bool:
    """Return whether one call of twice the batch is faster than two calls: on a GPU, whose kernels it fills better."""
    return device != "cpu"


class Joined:
    """`joined(x, t, condition, null)` returns the outputs with both conditions, from one call where memory allows it.

    After a call for which the memory does not suffice, the outputs for as large an x come from two calls, as long as
    `owner` exists: the network without its ControlNet. `context` and `control` are those of `predictor`, and `rows` is
    that of `in_whole_batches`.
    """

    def __init__(
        self,
        network: nn.Module,
        context: Tensor | None,
        control: Tensor | None,
        precision: str,
        owner: nn.Module,
        rows: int | None = None,
    ) -> None:
        both = in_whole_batches(network, None if rows is None else 2 * rows)
        self.at_once = predictor(both, _twice(context), _twice(control), precision)
        self.separate = predictor(in_whole_batches(network, rows), context, control, precision)
        self.owner, self.rows = owner, rows

    def __call__(self, x: Tensor, t: float, condition: Tensor, null: Tensor) -> tuple[Tensor, Tensor]:
        values = x.numel() if self.rows is None else x[0].numel() * self.rows
        if values < _TOO_LARGE.get(self.owner, math.inf):
            try:
                first, second = self.at_once(torch.cat([x, x]), t, torch.cat([condition, null])).chunk(2)
            except torch.OutOfMemoryError:
                _TOO_LARGE[self.owner] = values  # what the failed call holds is released after this block
            else:
                return first, second
        return self.separate(x, t, condition), self.separate(x, t, null)


def _twice(rows: Tensor | None) -> Tensor | None:
    return None if rows is None else torch.cat([rows, rows])
