"""The training loop of the judge's and the codec's networks: on a CPU the same seed gives the same weights."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
import torch

Progress: TypeAlias = Callable[[Iterable[int]], Iterable[int]]
"""Wraps the range of steps, as `tqdm` does."""

PEAK_LEARNING_RATE = 3e-3
WARM_UP = 0.2
"""Fraction of the steps with linear warm-up of the learning rate; linear decay to zero follows."""
WEIGHT_DECAY = 0.02


class Pixels(Protocol):
    """Images uint8 [N, C, S, S] that a training reads by rows: an array, or what holds the rows that it draws."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (N, C, S, S)."""

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray:
        """Return the images of rows, int64 [B]: uint8 [B, C, S, S]."""


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of `fit`."""

    steps: int
    """Optimizer steps."""
    batch_size: int = 64
    """Images per step."""
    seed: int = 0
    """Seed of the initial weights, the batches and the noise."""
    flip: bool = False
    """Flip half of the images horizontally, at random."""
    device: str = "cpu"
    """Name of a torch device."""
    progress: Progress = iter
    """Wraps the iterable of steps, such as `tqdm`."""
    learning_rate: float = PEAK_LEARNING_RATE
    """Peak of the schedule."""


Network = TypeVar("Network", bound="torch.nn.Module")
_GLOBAL_STATE = threading.Lock()
"""Held while torch's global random state is changed: trainings may run at once."""


def seeded(build: Callable[[], Network], seed: int) -> Network:
    """Return `build()` with initial weights that depend on `seed` alone; torch's global random state is unchanged."""
    with _GLOBAL_STATE, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def fit(
    network: torch.nn.Module,
    loss: Callable[[np.ndarray, torch.Generator], torch.Tensor],
    count: int,
    recipe: Recipe,
) -> None:
    """Train `network` in place with AdamW, linear warm-up and linear decay; it ends in evaluation mode.

    `loss(rows, generator)` receives the int64 indices [B] of a batch out of `count` samples and a generator for random
    augmentation, and returns a scalar. Each epoch is a new permutation.
    """
    network.train()
    steps = recipe.steps
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    warmup = max(1, round(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    order = _rows(count, recipe.batch_size, np.random.default_rng(recipe.seed))
    for _ in recipe.progress(range(steps)):
        value = loss(next(order), generator)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        schedule.step()
    network.eval()


def drawn_rows(count: int, recipe: Recipe) -> np.ndarray:
    """Return which of `count` samples `fit` draws, int64 [at most steps x batch size], ascending."""
    drawn = np.zeros(count, np.bool_)
    for batch in itertools.islice(_rows(count, recipe.batch_size, np.random.default_rng(recipe.seed)), recipe.steps):
        drawn[batch] = True
    return np.flatnonzero(drawn)


def _rows(count: int, batch_size: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield batches of indices without end; each epoch is shuffled, and its incomplete last batch is dropped."""
    size = min(batch_size, count)
    while True:
        order = random.permutation(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]
