"""A data set on the device as it is stored, or in memory-mapped shards that are read batch by batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import psutil
import torch
from torch import Tensor

from models.device import sent
from tasks.formats import latents
from tasks.formats.latents import SQUARE

MEMORY_SHARE = 0.3
"""Share of the free memory that the data set may take under `data_on_device: auto`; the rest is for training."""

BLOCK_BYTES = 4 * 2**20
"""Size of the blocks in which a data set is copied to the device."""
READ_AHEAD = 8
"""Most batches of a streamed store that are read before they are needed."""


class Store(Protocol):
    """One split as it is stored, or all caption embeddings.

    The columns of a split are `pixels` uint8 [N, C, H, W], or `mean` and `std` bfloat16 [N, V, C, H, W], and `labels`
    int64 [N], or `captions` int32 [N, K] with `sizes` int32 [N, 6] under SDXL conditioning, and `control` uint8
    [N, 1 or 3, h, w] for a ControlNet. The captions have one column, `embeddings` bfloat16 [U, L, D].
    """

    count: int
    where: str
    """Where the data lies, for the progress line."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of one row of each column."""

    def gather(self, rows: Tensor, following: Callable[[], Tensor] | None) -> dict[str, Tensor]:
        """Return the rows int64 [B] of every column, on the device; `following` predicts the rows of the next call.

        The rows are on the CPU, where they are chosen, so that the host does not wait for a GPU.
        """
        ...

    def on_host(self, name: str, rows: Tensor) -> np.ndarray:
        """Return the rows int64 [B] of one column, on the CPU."""
        ...


class Resident:
    """The whole split on the device; a batch is one gather there."""

    where = "on the device"

    def __init__(self, shards: Sequence[dict[str, np.ndarray]], device: torch.device) -> None:
        self.device, self.shards = device, shards
        self.count = sum(len(next(iter(shard.values()))) for shard in shards)
        self.shapes = {name: column.shape[1:] for name, column in shards[0].items()}
        self.columns = {name: self._filled([shard[name] for shard in shards]) for name in shards[0]}

    def _filled(self, parts: Sequence[np.ndarray]) -> Tensor:
        """Copy the parts of a column to the device through one small buffer, so host memory holds no second copy."""
        empty = latents.as_tensor(parts[0][:0])
        stored = torch.empty((self.count, *parts[0].shape[1:]), dtype=empty.dtype, device=self.device)
        bits = torch.int16 if empty.dtype == torch.bfloat16 else empty.dtype  # as NumPy reads bfloat16
        column, filled = stored.view(bits), 0
        rows = max(1, BLOCK_BYTES // max(1, parts[0][:1].nbytes))
        buffer = torch.empty((rows, *column.shape[1:]), dtype=bits, pin_memory=self.device.type == "cuda")
        for part in parts:
            for start in range(0, len(part), rows):
                block = part[start : start + rows]
                np.copyto(buffer[: len(block)].numpy(), block)
                column[filled : filled + len(block)].copy_(buffer[: len(block)])
                filled += len(block)
        return stored

    def gather(self, rows: Tensor, following: Callable[[], Tensor] | None) -> dict[str, Tensor]:
        del following
        rows = sent(rows, self.device)
        return {name: column[rows] for name, column in self.columns.items()}

    def on_host(self, name: str, rows: Tensor) -> np.ndarray:
        return rows_of([shard[name] for shard in self.shards], rows.numpy())


class Streamed:
    """Memory-mapped shards; the next batch is read from the disk while the device works on the current one.

    Buckets share the embeddings of the captions, and each predicts its own next batch, so several are read ahead.
    """

    where = "streamed"

    def __init__(self, shards: Sequence[dict[str, np.ndarray]], device: torch.device) -> None:
        self.shards, self.device = shards, device
        self.count = sum(len(next(iter(shard.values()))) for shard in shards)
        self.shapes = {name: column.shape[1:] for name, column in shards[0].items()}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead = dict[bytes, Future[dict[str, Tensor]]]()

    def gather(self, rows: Tensor, following: Callable[[], Tensor] | None) -> dict[str, Tensor]:
        ahead = self._ahead.pop(rows.numpy().tobytes(), None)
        columns = ahead.result() if ahead else self._read(rows)
        if following is not None:
            predicted = following()
            self._ahead[predicted.numpy().tobytes()] = self._reader.submit(self._read, predicted)
            if len(self._ahead) > READ_AHEAD:
                del self._ahead[next(iter(self._ahead))]
        return {name: column.to(self.device, non_blocking=True) for name, column in columns.items()}

    def on_host(self, name: str, rows: Tensor) -> np.ndarray:
        return rows_of([shard[name] for shard in self.shards], rows.numpy())

    def _read(self, rows: Tensor) -> dict[str, Tensor]:
        wanted = rows.numpy()
        tensors = {name: latents.as_tensor(column) for name, column in self._arrays(wanted).items()}
        return {name: t.pin_memory() for name, t in tensors.items()} if self.device.type == "cuda" else tensors

    def _arrays(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {name: rows_of([shard[name] for shard in self.shards], rows) for name in self.shapes}


def rows_of(parts: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Return rows int64 [B] of a column that lies in several parts."""
    starts = np.cumsum([0, *(len(part) for part in parts)])
    part_of = np.searchsorted(starts, rows, "right") - 1
    column = np.empty((len(rows), *parts[0].shape[1:]), parts[0].dtype)
    for number in np.unique(part_of):
        places = np.flatnonzero(part_of == number)
        column[places] = parts[number][rows[places] - starts[number]]
    return column


def open_store(data: Path, split: str, where: str, device: torch.device, bucket: int = SQUARE) -> Store:
    """Open one bucket of a split.

    Args:
        data: the folder of the latents.
        split: "train" or "test".
        where: "device", "stream", or "auto", which decides by the free memory.
        device: where batches are drawn.
        bucket: index of the bucket.
    """
    return fitting(latents.open_shards(data, split, bucket), where, device)


def fitting(shards: Sequence[dict[str, np.ndarray]], where: str, device: torch.device) -> Store:
    """Open shards where they fit; `where` and `device` are those of `open_store`."""
    size = sum(column.nbytes for shard in shards for column in shard.values())
    fits = where == "device" or (where == "auto" and size <= MEMORY_SHARE * free_memory(device))
    return Resident(shards, device) if fits else Streamed(shards, device)


def free_memory(device: torch.device) -> float:
    """Measure the bytes that are free for this process's tensors on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (most := limit.read_text().strip()) != "max":  # a container may have less than its host
        free = min(free, max(0, int(most) - int(used.read_text())))
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
