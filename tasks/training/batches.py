"""Batches drawn on the device, from the stores of `tasks/training/stores.py`.

Every random choice of step s is a function of (seed, s, process) and of nothing before it. A resumed run therefore
needs no generator states: it draws the same batches, noise and dropout from its step. Both stores return the same rows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.images.pixels import from_uint8
from models.networks.control_maps import as_input
from models.networks.text_encoder import APPLY_BATCH, load_text_encoder, with_sizes
from models.optimization.diffusion import drop_condition
from tasks.formats import latents
from tasks.training.remote import Bucket, open_texts

if TYPE_CHECKING:
    from models.networks.text_encoder import AnyEncoder
    from models.optimization.timesteps import Timesteps
    from tasks.training.stores import Store


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

    def repeated(self, count: int) -> Batch:
        """Return `count` times the first sample."""

        def again(column: Tensor) -> Tensor:
            return torch.cat([column[:1]] * count)

        others = (self.condition, self.control, self.weight)
        return Batch(
            again(self.x0), again(self.eps), again(self.t), *(None if each is None else again(each) for each in others)
        )

    @property
    def conditions(self) -> tuple[Tensor | None, ...]:
        """Return what a network is called with after x and t."""
        return (self.condition,) if self.control is None else (self.condition, self.control)


@dataclass(frozen=True)
class Conditioning:
    """What the model is conditioned on, for all splits and buckets of a data set."""

    classes: int = 0
    """Number of labels, which is also the null label."""
    texts: Store | None = None
    """Embeddings or token ids of the captions; None without text."""
    text_encoder: AnyEncoder | None = None
    """Encodes token ids before they condition the network; None if captions are stored as embeddings, or if the
    network encodes them (DreamBooth)."""
    text_precision: str = "no"
    """Precision of `text_encoder`, that of `encode.precision`."""
    null_text: Tensor | None = None
    """float32 [L, D]: embedding of the empty text, the null condition."""
    pooled: int | None = None
    """Width of the pooled prompt embedding (SDXL conditioning), with which each image's `sizes` are used."""
    control_factor: int | None = None
    """Side of an image relative to that of a sample, if there are control maps for a ControlNet; None without them."""


def open_conditioning(
    data: Path, where: str, device: torch.device, codec: Path | None = None, remote: Bucket | None = None
) -> Conditioning:
    """Open the conditions of a data set.

    Args:
        data: the folder of the latents.
        where: as for `open_store`.
        device: where conditions are made.
        codec: the folder with the text encoder, which captions that are stored as token ids need.
        remote: where the shards of the captions lie, if not in `data`.
    """
    index, prompts, texts = (
        latents.read_index(data),
        latents.load_prompts(data),
        open_texts(data, where, device, remote),
    )
    tokens = texts is not None and "ids" in texts.shapes
    return Conditioning(
        classes=len(index.classes),
        texts=texts,
        text_encoder=_text_encoder(codec, device) if tokens else None,
        text_precision=index.text_precision or "no",
        null_text=None if prompts is None else prompts[-1].float(),
        pooled=index.text.pooled if index.text else None,
        control_factor=index.image.size // index.size if index.control else None,
    )


def _text_encoder(codec: Path | None, device: torch.device) -> AnyEncoder:
    assert codec is not None, "captions that are stored as token ids need the text encoder"
    return load_text_encoder(codec, str(device))


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
        texts = self._texts(step, part, following)
        flipped = self._flipped(len(next(iter(columns.values()))), generator)
        x0 = self._images(columns, flipped, generator)
        t = config.timesteps_at(step).draw(len(x0), generator)
        eps = torch.randn(x0.shape, generator=generator, device=self.device)
        condition = self._condition(columns, texts, generator)
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
            rows = torch.arange(count) % self.store.count
            first = torch.from_numpy(self.store.on_host("captions", rows)[:, 0]).long()
            return self._with_sizes(self._encoded(self.texts.gather(first, None)), self.store.gather(rows, None))
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

    def captions(self, step: int, part: int = 0) -> Tensor:
        """Return rows of the texts int64 [B], on the CPU: one of each image's captions, at random."""
        generator = torch.Generator().manual_seed(
            seed_for(self.config.seed, "captions", step, part, self.config.process)
        )
        captions = torch.from_numpy(self.store.on_host("captions", self.rows(step, part)))
        pick = (torch.rand(len(captions), generator=generator) * (captions >= 0).sum(1)).long()
        return captions.gather(1, pick[:, None])[:, 0].long()

    def _texts(self, step: int, part: int, following: tuple[int, int]) -> Tensor | None:
        """Return the embeddings float32 [B, L, D] of the chosen captions, or their token ids int64 [B, L]."""
        if self.texts is None:
            return None
        return self._encoded(self.texts.gather(self.captions(step, part), lambda: self.captions(*following)))

    def _condition(self, columns: dict[str, Tensor], texts: Tensor | None, generator: torch.Generator) -> Tensor | None:
        if texts is not None:
            condition = texts
        elif "labels" in columns:
            condition = columns["labels"]
        else:
            return None
        dropped = torch.rand(len(condition), generator=generator, device=self.device) < self.config.condition_dropout
        return self._with_sizes(drop_condition(condition, self.null, dropped), columns)

    def _with_sizes(self, condition: Tensor, columns: dict[str, Tensor]) -> Tensor:
        """Add the images' sizes to a condition, the null condition as well, under SDXL conditioning."""
        pooled = self.conditioning.pooled
        return condition if pooled is None else with_sizes(condition, pooled, columns["sizes"])

    def _encoded(self, texts: dict[str, Tensor]) -> Tensor:
        """Return the embeddings float32 [B, L, D] of captions, or their token ids int64 [B, L] if the network has them.

        Embeddings are rounded to bfloat16 as stored ones are.
        """
        if "ids" not in texts:
            return texts["embeddings"].float()
        ids, encoder = texts["ids"].long(), self.conditioning.text_encoder
        if encoder is None:
            return ids
        precision, parts = self.conditioning.text_precision, ids.split(APPLY_BATCH)
        return torch.cat([encoder.encode_ids(part, precision).to(torch.bfloat16) for part in parts]).float()
