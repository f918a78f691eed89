"""How to respond if the memory of a training runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from tasks.params import TrainParams


@contextmanager
def explain_out_of_memory(params: TrainParams) -> Iterator[None]:
    """Turn an out-of-memory error of the device into a `StageError` that names remedies."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise StageError(
            f"the device's memory ran out with train.batch_size {params.batch_size} in {params.gradient_accumulation} "
            "part(s); raise train.gradient_accumulation, set train.gradient_checkpointing to true or "
            "train.data_on_device to 'stream', or lower train.batch_size"
        ) from error
