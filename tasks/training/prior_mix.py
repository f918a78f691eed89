"""Batches of DreamBooth: the subject's pictures, and class images that preserve the prior (Ruiz et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.numpy import load_file

from tasks.formats import latents
from tasks.formats.prior import CLASS, LATENTS, SUBJECT, TOKENS
from tasks.training.batches import Batch, Batches, Conditioning, open_conditioning, seed_for
from tasks.training.stores import Resident, open_store

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.training.batches import DrawConfig


@dataclass(frozen=True)
class Subject:
    """What DreamBooth trains on."""

    folder: Path
    """The output of `prior`."""
    codec: Path | None = None
    """Folder with the text encoder, if that is trained as well."""


class PriorMix:
    """`Batches` of which the first half are the subject's pictures and the second half class images.

    The loss of a sample has the factor 2 in the first half and 2 `weight` in the second, so the mean over the batch is
    the mean loss of the subject plus `weight` times that of the class (eq. 2). Only class images lose their condition
    at times: pictures of the subject without it would make every unguided image resemble the subject.
    """

    def __init__(self, subject: Batches, classes: Batches, weight: float) -> None:
        self.subject, self.classes, self.weight = subject, classes, weight
        self.shape, self.where = subject.shape, subject.where
        self.size = subject.size + classes.size

    def draw(self, step: int, part: int = 0) -> Batch:
        """Draw the batch of `step` (0-based) and `part`; equal arguments return equal tensors."""
        ours, theirs = self.subject.draw(step, part), self.classes.draw(step, part)
        factors = [torch.full((len(batch.t),), 2.0, device=batch.x0.device) for batch in (ours, theirs)]
        assert ours.condition is not None and theirs.condition is not None, "DreamBooth is conditioned on text"
        return Batch(
            torch.cat([ours.x0, theirs.x0]),
            torch.cat([ours.eps, theirs.eps]),
            torch.cat([ours.t, theirs.t]),
            torch.cat([ours.condition, theirs.condition]),
            weight=torch.cat([factors[0], self.weight * factors[1]]),
        )

    def conditions(self, count: int) -> Tensor | None:
        """Return conditions for `count` sample images: first the subject, then the class."""
        first = -(-count // 2)
        parts = [self.subject.conditions(first), self.classes.conditions(count - first)]
        return torch.cat([part for part in parts if part is not None])

    def controls(self, count: int) -> None:
        """Return no control maps: DreamBooth trains without a ControlNet."""


def open_mix(
    source: Subject, config: DrawConfig, weight: float, where: str, device: torch.device
) -> Batches | PriorMix:
    """Open the batches of DreamBooth; without class images, or with `weight` 0, those of the subject alone.

    `config` is that of the whole batch; `where` and `device` are those of `open_store`. Conditions are embeddings, or
    token ids if the text encoder is trained.
    """
    inputs, dropout = source.folder / LATENTS, config.condition_dropout
    conditioning = open_conditioning(inputs, where, device) if source.codec is None else _tokens(source.folder, device)
    subject, config = open_store(inputs, SUBJECT, where, device), replace(config, condition_dropout=0.0)
    if not weight or not latents.read_index(inputs).splits[CLASS].count:
        return Batches(subject, conditioning, config, device)
    size = config.batch_size // 2
    ours = replace(config, batch_size=size, seed=seed_for(config.seed, SUBJECT))
    theirs = replace(config, batch_size=size, seed=seed_for(config.seed, CLASS), condition_dropout=dropout)
    classes = open_store(inputs, CLASS, where, device)
    return PriorMix(
        Batches(subject, conditioning, ours, device), Batches(classes, conditioning, theirs, device), weight
    )


def _tokens(folder: Path, device: torch.device) -> Conditioning:
    ids = load_file(folder / TOKENS)["ids"]
    return Conditioning(texts=Resident([{"ids": ids[:2]}], device), null_text=torch.from_numpy(ids[2]))
