"""The memory of a training process: freed memory stays with the process, and how to respond if it runs out."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from tasks.params import TrainParams

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # <malloc.h>
TOP_PAD_BYTES = 64 * 2**20


def keep_freed() -> None:
    """Make glibc keep freed memory for the next allocation instead of returning it to the kernel; idempotent.

    PyTorch caches no memory on a CPU. Each step's activations would be mapped, zeroed page by page and unmapped
    again: thousands of page faults, a tenth of the step's time. The process keeps its peak memory. Without glibc this
    does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    mallopt(MMAP_MAX, 0)
    mallopt(TRIM_THRESHOLD, -1)
    mallopt(TOP_PAD, TOP_PAD_BYTES)


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
