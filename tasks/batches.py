"""Batches drawn where the model is: the data set lies on the device as uint8 and a step gathers its rows.

Every random choice of step s is a function of (seed, s, process) and of nothing that came before.
A resumed run therefore needs no generator states: it draws the same batches, noise and dropout by
knowing its step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tasks.latents import Latents


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed that differs whenever any part does."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class Batch:
    """One step's draw: `x0` and `eps` float32 [B, C, H, W], `t` int64 [B], `condition` int64 [B] or float [B, E]."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    condition: Tensor | None


class Batches:
    """Draws the samples of a step for one of `processes`, `batch_size` in `parts` accumulation parts each."""

    def __init__(
        self,
        latents: Latents,
        *,
        batch_size: int,
        timesteps: int,
        condition_dropout: float,
        horizontal_flip: bool,
        seed: int,
        device: torch.device,
        parts: int = 1,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.pixels = torch.from_numpy(latents.pixels).to(device)
        self.condition, self.null = conditions_of(latents, device)
        self.prompts = None if latents.prompts is None else torch.from_numpy(latents.prompts)
        self.size, self.parts, self.timesteps = batch_size // parts, parts, timesteps
        self.condition_dropout, self.horizontal_flip = condition_dropout, horizontal_flip
        self.seed, self.device = seed, device
        self.process, self.processes = process, processes
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def draw(self, step: int, part: int = 0) -> Batch:
        """The batch of `step` (0-based) and `part`; the same arguments give the same tensors."""
        generator = torch.Generator(self.device).manual_seed(seed_for(self.seed, "batch", step, part, self.process))
        rows = self.rows(step, part)
        x0 = self.pixels[rows].float() / 127.5 - 1
        if self.horizontal_flip:
            flipped = torch.rand(len(rows), generator=generator, device=self.device) < 0.5
            x0 = torch.where(flipped[:, None, None, None], x0.flip(3), x0)
        t = torch.randint(self.timesteps, (len(rows),), generator=generator, device=self.device)
        eps = torch.randn(x0.shape, generator=generator, device=self.device)
        return Batch(x0, eps, t, self._condition(rows, generator))

    def rows(self, step: int, part: int = 0) -> Tensor:
        """Indices int64 [B]: the next positions in one endless sequence of shuffled epochs, shared by all processes."""
        count = len(self.pixels)
        position = ((step * self.parts + part) * self.processes + self.process) * self.size
        pieces, missing = [], self.size
        while missing:
            epoch, offset = divmod(position, count)
            pieces.append(self._order_of(epoch)[offset : offset + missing])
            position, missing = position + len(pieces[-1]), missing - len(pieces[-1])
        return torch.cat(pieces).to(self.device)

    def _order_of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_for(self.seed, "epoch", epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.pixels), generator=generator)
        return self._order

    def _condition(self, rows: Tensor, generator: torch.Generator) -> Tensor | None:
        from models.diffusion import drop_condition

        if self.condition is None or self.null is None:
            return None
        condition = self.condition[rows]
        if condition.ndim == 3:  # several captions a picture: one is drawn
            pick = torch.randint(condition.shape[1], (len(rows),), generator=generator, device=self.device)
            condition = condition[torch.arange(len(rows), device=self.device), pick]
        dropped = torch.rand(len(rows), generator=generator, device=self.device) < self.condition_dropout
        return drop_condition(condition, self.null, dropped)


def conditions_of(latents: Latents, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """(condition of each sample, null condition): labels int64 [N], embeddings float [N, K, E], or two Nones."""
    if latents.embeddings is not None and latents.prompts is not None:
        return torch.from_numpy(latents.embeddings).to(device), torch.from_numpy(latents.prompts[-1]).to(device)
    if latents.labels is not None:
        null = torch.tensor(latents.classes, dtype=torch.int64, device=device)
        return torch.from_numpy(latents.labels).to(device), null
    return None, None
