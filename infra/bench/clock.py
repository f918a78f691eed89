"""Time training steps in blocks, and alternate the blocks of the sides that are compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

import torch

from tasks.runtime.progress import progress

if TYPE_CHECKING:
    from models.networks.network import NetworkConfig

WARM_UP = 3
"""Untimed steps at the beginning: they choose kernels and allocate memory."""


@dataclass(frozen=True)
class Block:
    """Consecutive steps. `cpu_seconds` is the CPU time of all threads of the process."""

    steps: int
    images: int
    seconds: float
    cpu_seconds: float

    @property
    def machine_seconds(self) -> float:
        """Seconds on an otherwise idle machine: on a CPU, the CPU time divided by the number of threads."""
        return self.seconds if torch.cuda.is_available() else self.cpu_seconds / torch.get_num_threads()


Name = TypeVar("Name")
Advance: TypeAlias = Callable[[int], Block]
"""Makes that many optimizer steps."""


class Run(Protocol):
    """A training run of either side."""

    @property
    def config(self) -> NetworkConfig:
        """Architecture of the network."""
        ...

    def advance(self, steps: int) -> tuple[float, float]:
        """Make `steps` optimizer steps; returns `now()` after the last."""
        ...

    def averaged(self) -> dict[str, torch.Tensor]:
        """The averaged weights by parameter name."""
        ...


def now() -> tuple[float, float]:
    """Wall-clock and CPU seconds of this process, after all pending work of the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def advance(run: Run, steps: int, batch_size: int) -> Block:
    """Make `steps` optimizer steps of a run in this process, and time them."""
    began, cpu_began = now()
    ended, cpu_ended = run.advance(steps)
    return Block(steps, steps * batch_size, ended - began, cpu_ended - cpu_began)


def take_turns(advances: Mapping[Name, Advance], rounds: int, seconds: float, title: str) -> dict[Name, list[Block]]:
    """Run a block of each side in every round, in reverse order in every second round.

    A block has as many steps as fit into `seconds`, at least one. Returns the blocks of each side, in order.
    """
    steps = {}
    for name, advance_side in advances.items():
        advance_side(WARM_UP)
        steps[name] = max(1, round(seconds * WARM_UP / advance_side(WARM_UP).seconds))
    blocks: dict[Name, list[Block]] = {name: [] for name in advances}
    order = list(advances)
    turns = [name for turn in range(rounds) for name in (order if turn % 2 == 0 else reversed(order))]
    for name in progress(turns, desc=title, unit="block"):
        blocks[name].append(advances[name](steps[name]))
    return blocks
