"""Batches drawn where the model is, from a data set that lies there as it is stored, or from its mapped shards.

Every random choice of step s is a function of (seed, s, process) and of nothing that came before.
A resumed run therefore needs no generator states: it draws the same batches, noise and dropout by
knowing its step. Where the data lies decides nothing: both stores give the same rows.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from models.pixels import from_uint8
from tasks.formats import latents
from tasks.formats.latents import SQUARE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SHARE = 0.3
"""Of the free memory, what the data set may take under `auto`; network, activations and the rest need theirs."""


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed that differs whenever any part does."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class Batch:
    """One step's draw: `x0` and `eps` float32 [B, C, H, W], `t` int64 [B], `condition` int64 [B] or float [B, L, D]."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    condition: Tensor | None

    def split(self, size: int) -> list[Batch]:
        """The same samples in batches of at most `size`."""
        count = len(self.t)
        conditions = self.condition.split(size) if self.condition is not None else [None] * -(-count // size)
        return [
            Batch(*parts)
            for parts in zip(self.x0.split(size), self.eps.split(size), self.t.split(size), conditions, strict=True)
        ]


class Store(Protocol):
    """One split as it is stored: columns `pixels` uint8 [N, C, H, W], or `mean` and `std` bfloat16 [N, V, C, H, W];
    `labels` int64 [N], or `captions` int32 [N, K] (and `sizes` int32 [N, 6]). Or all texts: one column `embeddings`
    bfloat16 [U, L, D]."""

    count: int
    where: str
    shapes: dict[str, tuple[int, ...]]
    """Shape of one row of each column."""

    def gather(self, rows: Tensor, following: Callable[[], Tensor] | None) -> dict[str, Tensor]:
        """Rows int64 [B], wherever they are, of every column, on the device; `following` says which will probably be
        asked for next, where that is known."""
        ...


class Resident:
    """The whole split on the device; a batch is one gather there."""

    where = "on the device"

    def __init__(self, shards: Sequence[dict[str, np.ndarray]], device: torch.device) -> None:
        self.columns = {
            name: latents.as_tensor(np.concatenate([shard[name] for shard in shards])).to(device) for name in shards[0]
        }
        self.device = device
        self.count = sum(len(next(iter(shard.values()))) for shard in shards)
        self.shapes = {name: column.shape[1:] for name, column in shards[0].items()}

    def gather(self, rows: Tensor, following: Callable[[], Tensor] | None) -> dict[str, Tensor]:
        del following
        rows = rows.to(self.device, non_blocking=True)
        return {name: column[rows] for name, column in self.columns.items()}


class Streamed:
    """Memory-mapped shards; the next batch is read from the disk while the device works on this one."""

    where = "streamed"

    def __init__(self, shards: Sequence[dict[str, np.ndarray]], device: torch.device) -> None:
        self.shards, self.device = shards, device
        self.starts = np.cumsum([0, *(len(next(iter(shard.values()))) for shard in shards)])
        self.count = int(self.starts[-1])
        self.shapes = {name: column.shape[1:] for name, column in shards[0].items()}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[list[int], Future[dict[str, Tensor]]] | None = None

    def gather(self, rows: Tensor, following: Callable[[], Tensor] | None) -> dict[str, Tensor]:
        ahead, self._ahead, rows = self._ahead, None, rows.cpu()
        columns = ahead[1].result() if ahead and ahead[0] == rows.tolist() else self._read(rows)
        if following is not None:
            then = following()
            self._ahead = then.tolist(), self._reader.submit(self._read, then)
        return {name: column.to(self.device, non_blocking=True) for name, column in columns.items()}

    def _read(self, rows: Tensor) -> dict[str, Tensor]:
        wanted = rows.numpy()
        shard_of = np.searchsorted(self.starts, wanted, "right") - 1
        columns = {
            name: np.empty((len(wanted), *self.shapes[name]), column.dtype) for name, column in self.shards[0].items()
        }
        for number in np.unique(shard_of):
            places = np.flatnonzero(shard_of == number)
            for name, column in columns.items():
                column[places] = self.shards[number][name][wanted[places] - self.starts[number]]
        tensors = {name: latents.as_tensor(column) for name, column in columns.items()}
        return {name: t.pin_memory() for name, t in tensors.items()} if self.device.type == "cuda" else tensors


def open_store(data: Path, split: str, where: str, device: torch.device, bucket: int = SQUARE) -> Store:
    """The store of a bucket of a split: `where` is device, stream, or auto, which compares its size with the free
    memory."""
    return _store(latents.open_shards(data, split, bucket), where, device)


def open_texts(data: Path, where: str, device: torch.device) -> Store | None:
    """The store of all captions' embeddings; None where captions do not condition the model."""
    shards = latents.open_texts(data)
    return _store(shards, where, device) if shards else None


def _store(shards: Sequence[dict[str, np.ndarray]], where: str, device: torch.device) -> Store:
    size = sum(column.nbytes for shard in shards for column in shard.values())
    fits = where == "device" or (where == "auto" and size <= SHARE * free_memory(device))
    return Resident(shards, device) if fits else Streamed(shards, device)


def free_memory(device: torch.device) -> float:
    """Bytes that are free for this process where `device` keeps its tensors, as measured now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (most := limit.read_text().strip()) != "max":  # a container may have less than its host
        free = min(free, max(0, int(most) - int(used.read_text())))
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class Batches:
    """Draws the samples of a step for one of `processes`, `batch_size` in `parts` accumulation parts each.

    `texts` are the embeddings that captions point to and `null_text` [L, D] stands for no condition; `classes` is
    the number of labels, and the label of none. With `pooled` the embeddings are packed
    (`models/networks/text_encoder.py`) and get each image's `sizes`.
    """

    def __init__(
        self,
        store: Store,
        *,
        batch_size: int,
        timesteps: int,
        condition_dropout: float,
        horizontal_flip: bool,
        seed: int,
        device: torch.device,
        classes: int = 0,
        texts: Store | None = None,
        null_text: Tensor | None = None,
        pooled: int | None = None,
        parts: int = 1,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.store, self.where = store, store.where
        self.classes, self.texts, self.pooled = classes, texts, pooled
        self.shape = store.shapes["pixels"] if "pixels" in store.shapes else store.shapes["mean"][1:]
        self.null = torch.tensor(classes, device=device) if null_text is None else null_text.to(device)
        self.size, self.parts, self.timesteps = batch_size // parts, parts, timesteps
        self.condition_dropout, self.horizontal_flip = condition_dropout, horizontal_flip
        self.seed, self.device = seed, device
        self.process, self.processes = process, processes
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def draw(self, step: int, part: int = 0) -> Batch:
        """The batch of `step` (0-based) and `part`; the same arguments give the same tensors."""
        generator = torch.Generator(self.device).manual_seed(seed_for(self.seed, "batch", step, part, self.process))
        following = (step, part + 1) if part + 1 < self.parts else (step + 1, 0)
        columns = self.store.gather(self.rows(step, part), lambda: self.rows(*following))
        x0 = self._images(columns, generator)
        count = len(x0)
        t = torch.randint(self.timesteps, (count,), generator=generator, device=self.device)
        eps = torch.randn(x0.shape, generator=generator, device=self.device)
        return Batch(x0, eps, t, self._condition(columns, generator))

    def _images(self, columns: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Pixels in [-1, 1], or latents drawn from their posterior; half of them mirrored where that is wanted."""
        count = len(next(iter(columns.values())))
        flipped = torch.zeros(count, dtype=torch.bool, device=self.device)
        if self.horizontal_flip:
            flipped = torch.rand(count, generator=generator, device=self.device) < 0.5
        if "pixels" in columns:
            x0 = from_uint8(columns["pixels"])
            return torch.where(flipped[:, None, None, None], x0.flip(3), x0) if self.horizontal_flip else x0
        rows = torch.arange(count, device=self.device)
        mean, std = (columns[name][rows, flipped.long()].float() for name in ("mean", "std"))
        return mean + std * torch.randn(mean.shape, generator=generator, device=self.device)

    def rows(self, step: int, part: int = 0) -> Tensor:
        """Indices int64 [B]: the next positions in one endless sequence of shuffled epochs, shared by all processes."""
        position = ((step * self.parts + part) * self.processes + self.process) * self.size
        pieces, missing = [], self.size
        while missing:
            epoch, offset = divmod(position, self.store.count)
            pieces.append(self._order_of(epoch)[offset : offset + missing])
            position, missing = position + len(pieces[-1]), missing - len(pieces[-1])
        return torch.cat(pieces)

    def conditions(self, count: int) -> Tensor | None:
        """Conditions to draw `count` samples by: each class in turn, or the captions of the first images."""
        if self.texts is not None:
            rows = torch.arange(count) % self.store.count
            columns = self.store.gather(rows, None)
            return self._sized(self._embeddings(columns["captions"][:, 0]), columns)
        if "labels" in self.store.shapes:
            return torch.arange(count, device=self.device) % self.classes
        return None

    def _embeddings(self, rows: Tensor) -> Tensor:
        """Rows int [B] of the texts -> float32 [B, L, D] on the device."""
        assert self.texts is not None, "asked for by captions"
        return self.texts.gather(rows.long(), None)["embeddings"].float()

    def _order_of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_for(self.seed, "epoch", epoch))
            self._epoch, self._order = epoch, torch.randperm(self.store.count, generator=generator)
        return self._order

    def _condition(self, columns: dict[str, Tensor], generator: torch.Generator) -> Tensor | None:
        from models.diffusion import drop_condition

        if self.texts is not None:  # several captions a picture: one is drawn
            captions = columns["captions"]
            draw = torch.rand(len(captions), generator=generator, device=self.device)
            pick = (draw * (captions >= 0).sum(1)).long()
            condition = self._embeddings(captions.gather(1, pick[:, None])[:, 0])
        elif "labels" in columns:
            condition = columns["labels"]
        else:
            return None
        count = len(condition)
        dropped = torch.rand(count, generator=generator, device=self.device) < self.condition_dropout
        return self._sized(drop_condition(condition, self.null, dropped), columns)

    def _sized(self, condition: Tensor, columns: dict[str, Tensor]) -> Tensor:
        """The condition with its images' sizes, where a network is told them: also of an image without caption."""
        from models.networks.text_encoder import with_sizes

        return condition if self.pooled is None else with_sizes(condition, self.pooled, columns["sizes"])


def conditioning_of(data: Path, where: str, device: torch.device) -> dict[str, Any]:
    """`classes`, `texts`, `null_text` and `pooled` of a data set, as `Batches` takes them."""
    prompts, index = latents.load_prompts(data), latents.read_index(data)
    return {
        "classes": len(index["classes"]),
        "pooled": (index["text"] or {}).get("pooled"),
        "texts": open_texts(data, where, device),
        "null_text": None if prompts is None else prompts[-1].float(),
    }
