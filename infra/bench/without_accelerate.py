"""What the reference's loop uses of accelerate's `Accelerator`, for machines where that is not installed.

One process, no gradient accumulation: the same operations on the device as with accelerate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class Accelerator:
    """The methods of `accelerate.Accelerator` that `infra/bench/peer.py` calls."""

    sync_gradients = True

    def __init__(self, mixed_precision: str) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bf16 = mixed_precision == "bf16"

    def prepare(
        self, model: nn.Module, optimizer: object, loader: Iterable[Tensor], schedule: object
    ) -> tuple[Any, ...]:  # what was given, as in accelerate
        """Move the model to the device; its forward pass is under autocast, and batches are loaded to the device."""
        forward = model.to(self.device).forward

        def under_autocast(*inputs: Tensor) -> object:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                return forward(*inputs)

        model.forward = under_autocast
        return model, optimizer, _OnDevice(loader, self.device), schedule

    def accumulate(self, model: nn.Module) -> AbstractContextManager[None]:
        del model
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Iterable[Tensor], norm: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, norm)

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return model


class AcceleratorState:
    """What all accelerators of a process share: nothing."""

    @staticmethod
    def _reset_state(reset_partial_state: bool) -> None:
        del reset_partial_state


class _OnDevice:
    """The batches of a loader, copied to a device."""

    def __init__(self, loader: Iterable[Tensor], device: torch.device) -> None:
        self.loader, self.device = loader, device

    def __iter__(self) -> Iterator[Tensor]:
        return (batch.to(self.device) for batch in self.loader)
