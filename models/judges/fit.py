"""The training loop of the small networks that measure: the same seed gives the same weights on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

Progress: TypeAlias = Callable[[Iterable[int]], Iterable[int]]
"""Wraps the range of steps, as `tqdm` does."""


PEAK_LEARNING_RATE = 3e-3
WARM_UP = 0.2
"""Share of the steps in which the learning rate rises; then it falls to zero."""
WEIGHT_DECAY = 0.02


@dataclass(frozen=True)
class Recipe:
    """How long, on what and from which seed a network is trained."""

    steps: int
    batch_size: int = 64
    seed: int = 0
    flip: bool = False
    """Mirror half of the images at random."""
    device: str = "cpu"
    progress: Progress = iter
    learning_rate: float = PEAK_LEARNING_RATE
    """At its peak."""


Network = TypeVar("Network", bound="torch.nn.Module")


def seeded(build: Callable[[], Network], seed: int) -> Network:
    """`build()` with first weights that depend on `seed` alone; torch's own random state is left as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def fit(
    network: torch.nn.Module,
    loss: Callable[[np.ndarray, torch.Generator], torch.Tensor],
    count: int,
    recipe: Recipe,
) -> None:
    """Train `network` in place with AdamW and one linear rise and fall of the learning rate.

    `loss(rows, generator)` gets the int64 indices [B] of a batch out of `count` and a generator for its
    random choices, and returns a scalar. Every epoch is a new permutation. Leaves the network in evaluation mode.
    """
    import torch

    network.train()
    steps = recipe.steps
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    rise = max(1, round(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
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


def _rows(count: int, batch_size: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches of indices for ever, each epoch shuffled anew; the last incomplete batch is left out."""
    size = min(batch_size, count)
    while True:
        order = random.permutation(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]
