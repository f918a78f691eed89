"""Batches drawn on the device, from a data set that lies there as it is stored, or from memory-mapped shards.

Every random choice of step s is a function of (seed, s, process) and of nothing before it. A resumed run therefore
needs no generator states: it draws the same batches, noise and dropout from its step. Both stores return the same rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import psutil
import torch
from torch import Tensor

from models.images.pixels import from_uint8
from models.networks.control_maps import as_input
from models.networks.text_encoder import with_sizes
from models.optimization.diffusion import drop_condition
from tasks.formats import latents
from tasks.formats.latents import SQUARE

if TYPE_CHECKING:
    from models.optimization.timesteps import Timesteps

MEMORY_SHARE = 0.3
"""Share of the free memory that the data set may take under `data_on_device: auto`; the rest is for training."""

BLOCK_BYTES = 4 * 2**20
"""Size of the blocks in which a data set is copied to the device."""


def seed_for(*parts: int | str) -> int:
    """Return a 63-bit seed that differs whenever a part does."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class Batch:
    """The samples of one step, or of one accumulated part of it."""

    x0: Tensor
    """float32 [B, C, H, W]"""
    eps: Tensor
    """float32 [B, C, H, W]: the noise"""
    t: Tensor
    """int64 [B], or float32 [B] on a rectified flow: timesteps"""
    condition: Tensor | None
    """int64 [B] labels, or float32 [B, L, D] token embeddings"""
    control: Tensor | None = None
    """float32 [B, 3, height, width] in [0, 1]: control maps at the resolution of the images, zeros where dropped"""
    weight: Tensor | None = None
    """float32 [B]: factor of each sample's loss; None is 1"""

    def split(self, size: int) -> list[Batch]:
        """Split into batches of at most `size` samples."""
        absent = [None] * -(-len(self.t) // size)
        columns = (self.x0, self.eps, self.t, self.condition, self.control, self.weight)
        parts = [absent if column is None else column.split(size) for column in columns]
        return [Batch(*part) for part in zip(*parts, strict=True)]

    @property
    def conditions(self) -> tuple[Tensor | None, ...]:
        """Return what a network is called with after x and t."""
        return (self.condition,) if self.control is None else (self.condition, self.control)


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
        """Return the rows int64 [B] of every column, on the device; `following` predicts the rows of the next call."""
        ...


class Resident:
    """The whole split on the device; a batch is one gather there."""

    where = "on the device"

    def __init__(self, shards: Sequence[dict[str, np.ndarray]], device: torch.device) -> None:
        self.device = device
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
        rows = rows.to(self.device, non_blocking=True)
        return {name: column[rows] for name, column in self.columns.items()}


class Streamed:
    """Memory-mapped shards; the next batch is read from the disk while the device works on the current one."""

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
            predicted = following()
            self._ahead = predicted.tolist(), self._reader.submit(self._read, predicted)
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
    """Open one bucket of a split.

    Args:
        data: the folder of the latents.
        split: "train" or "test".
        where: "device", "stream", or "auto", which decides by the free memory.
        device: where batches are drawn.
        bucket: index of the bucket.
    """
    return _store(latents.open_shards(data, split, bucket), where, device)


def _store(shards: Sequence[dict[str, np.ndarray]], where: str, device: torch.device) -> Store:
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


@dataclass(frozen=True)
class Conditioning:
    """What the model is conditioned on, for all splits and buckets of a data set."""

    classes: int = 0
    """Number of labels, which is also the null label."""
    texts: Store | None = None
    """Caption embeddings; None without text."""
    null_text: Tensor | None = None
    """float32 [L, D]: embedding of the empty text, the null condition."""
    pooled: int | None = None
    """Width of the pooled prompt embedding (SDXL conditioning), with which each image's `sizes` are used."""
    control_factor: int | None = None
    """Side of an image relative to that of a sample, if there are control maps for a ControlNet; None without them."""


def open_conditioning(data: Path, where: str, device: torch.device) -> Conditioning:
    """Open the conditions of a data set; the arguments are those of `open_store`."""
    index, prompts, shards = latents.read_index(data), latents.load_prompts(data), latents.open_texts(data)
    return Conditioning(
        classes=len(index.classes),
        texts=_store(shards, where, device) if shards else None,
        null_text=None if prompts is None else prompts[-1].float(),
        pooled=index.text.pooled if index.text else None,
        control_factor=index.image.size // index.size if index.control else None,
    )


@dataclass(frozen=True)
class DrawConfig:
    """How batches are drawn."""

    batch_size: int
    """Samples per step and process, over all accumulated parts."""
    timesteps: Timesteps
    seed: int
    condition_dropout: float = 0.0
    """Probability that a condition is replaced by the null condition (classifier-free guidance)."""
    horizontal_flip: bool = False
    """Whether half of the images are mirrored."""
    control_dropout: float | None = None
    """Probability that a control map is replaced by zeros; None draws no maps."""
    parts: int = 1
    """Gradient accumulation: parts per step."""
    process: int = 0
    processes: int = 1
    tuned_from: int | None = None
    """First step of consistency tuning, whose batches have the timesteps `tuning` instead."""
    tuning: Timesteps | None = None

    def timesteps_at(self, step: int) -> Timesteps:
        """Return the timesteps that the batch of 0-based `step` is drawn from."""
        return self.timesteps if self.tuning is None or step < (self.tuned_from or 0) else self.tuning


class Batches:
    """Draws the samples of each step for one process, from one bucket of a split."""

    def __init__(self, store: Store, conditioning: Conditioning, config: DrawConfig, device: torch.device) -> None:
        self.store, self.where = store, store.where
        self.conditioning, self.texts, self.config, self.device = conditioning, conditioning.texts, config, device
        self.shape = store.shapes["pixels"] if "pixels" in store.shapes else store.shapes["mean"][1:]
        """Shape of one sample."""
        null = torch.tensor(conditioning.classes) if conditioning.null_text is None else conditioning.null_text
        self.null = null.to(device)
        self.size = config.batch_size // config.parts
        """Samples per part."""
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def draw(self, step: int, part: int = 0) -> Batch:
        """Draw the batch of `step` (0-based) and `part`; equal arguments return equal tensors."""
        config = self.config
        generator = torch.Generator(self.device).manual_seed(seed_for(config.seed, "batch", step, part, config.process))
        following = (step, part + 1) if part + 1 < config.parts else (step + 1, 0)
        columns = self.store.gather(self.rows(step, part), lambda: self.rows(*following))
        flipped = self._flipped(len(next(iter(columns.values()))), generator)
        x0 = self._images(columns, flipped, generator)
        t = config.timesteps_at(step).draw(len(x0), generator)
        eps = torch.randn(x0.shape, generator=generator, device=self.device)
        condition = self._condition(columns, generator)
        return Batch(x0, eps, t, condition, self._control(columns, flipped, generator))

    def _flipped(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw which images are mirrored, bool [count]."""
        if self.config.horizontal_flip:
            return torch.rand(count, generator=generator, device=self.device) < 0.5
        return torch.zeros(count, dtype=torch.bool, device=self.device)

    def _images(self, columns: dict[str, Tensor], flipped: Tensor, generator: torch.Generator) -> Tensor:
        """Return pixels in [-1, 1] or samples of the latents' posterior, mirrored where `flipped`."""
        count = len(flipped)
        if "pixels" in columns:
            x0 = from_uint8(columns["pixels"])
            return torch.where(flipped[:, None, None, None], x0.flip(3), x0) if self.config.horizontal_flip else x0
        rows = torch.arange(count, device=self.device)
        mean, std = (columns[name][rows, flipped.long()].float() for name in ("mean", "std"))
        return mean + std * torch.randn(mean.shape, generator=generator, device=self.device)

    def rows(self, step: int, part: int = 0) -> Tensor:
        """Return indices int64 [B]: the next positions in the sequence of shuffled epochs that all processes share."""
        position = ((step * self.config.parts + part) * self.config.processes + self.config.process) * self.size
        pieces, missing = [], self.size
        while missing:
            epoch, offset = divmod(position, self.store.count)
            pieces.append(self._order_of(epoch)[offset : offset + missing])
            position, missing = position + len(pieces[-1]), missing - len(pieces[-1])
        return torch.cat(pieces)

    def _order_of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_for(self.config.seed, "epoch", epoch))
            self._epoch, self._order = epoch, torch.randperm(self.store.count, generator=generator)
        return self._order

    def conditions(self, count: int) -> Tensor | None:
        """Return conditions for `count` sample images: the classes in turn, or the captions of the first images."""
        if self.texts is not None:
            columns = self.store.gather(torch.arange(count) % self.store.count, None)
            return self._with_sizes(self._embeddings(self.texts, columns["captions"][:, 0]), columns)
        if "labels" in self.store.shapes:
            return torch.arange(count, device=self.device) % self.conditioning.classes
        return None

    def controls(self, count: int) -> Tensor | None:
        """Return the control maps of the first images, float32 [count, 3, height, width], as `conditions` does."""
        if self.config.control_dropout is None:
            return None
        columns = self.store.gather(torch.arange(count) % self.store.count, None)
        return as_input(columns["control"], *self._control_resolution())

    def _control_resolution(self) -> tuple[int, int]:
        """Return height and width of the images, by the factor by which they are larger than the samples."""
        factor = self.conditioning.control_factor or 1
        return self.shape[-2] * factor, self.shape[-1] * factor

    def _control(self, columns: dict[str, Tensor], flipped: Tensor, generator: torch.Generator) -> Tensor | None:
        """Return the control maps, mirrored with their images and dropped at random; None without a ControlNet."""
        if self.config.control_dropout is None:
            return None
        maps = as_input(columns["control"], *self._control_resolution())
        if self.config.horizontal_flip:
            maps = torch.where(flipped[:, None, None, None], maps.flip(3), maps)
        dropped = torch.rand(len(maps), generator=generator, device=self.device) < self.config.control_dropout
        return drop_condition(maps, maps.new_zeros(()), dropped)

    def _condition(self, columns: dict[str, Tensor], generator: torch.Generator) -> Tensor | None:
        if self.texts is not None:  # one of the image's captions, at random
            captions = columns["captions"]
            draw = torch.rand(len(captions), generator=generator, device=self.device)
            pick = (draw * (captions >= 0).sum(1)).long()
            condition = self._embeddings(self.texts, captions.gather(1, pick[:, None])[:, 0])
        elif "labels" in columns:
            condition = columns["labels"]
        else:
            return None
        dropped = torch.rand(len(condition), generator=generator, device=self.device) < self.config.condition_dropout
        return self._with_sizes(drop_condition(condition, self.null, dropped), columns)

    def _embeddings(self, texts: Store, rows: Tensor) -> Tensor:
        """Return the embeddings float32 [B, L, D] of captions int [B], or their token ids int64 [B, L]."""
        columns = texts.gather(rows.long(), None)
        return columns["ids"] if "ids" in columns else columns["embeddings"].float()

    def _with_sizes(self, condition: Tensor, columns: dict[str, Tensor]) -> Tensor:
        """Add the images' sizes to a condition, the null condition as well, under SDXL conditioning."""
        pooled = self.conditioning.pooled
        return condition if pooled is None else with_sizes(condition, pooled, columns["sizes"])
