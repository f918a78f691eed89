"""Work on a CPU that several threads do at once, each without parallel operators: parts of a batch, or whole trainings.

For a GPU, one thread draws the noise of the next step (`NoiseAhead`).

The operators of a small network are too short to gain from a second thread. Two halves of a batch, each computed by a
single thread, take about 0.6 times as long as the whole batch with two threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    import numpy as np

LEAST_IMAGES = 16
"""Images per worker; with fewer, Python's share of the time grows, which only one thread can spend at once."""

Part = TypeVar("Part")
Result = TypeVar("Result")


def workers_for(images: int, device: str = "cpu") -> int:
    """Return the number of threads among which a batch of `images` is split; 1 is no split, as on a GPU."""
    return 1 if device != "cpu" else max(1, min(torch.get_num_threads(), images // LEAST_IMAGES))


def over_batches(function: Callable[[slice], Result], count: int, batch_size: int, device: str = "cpu") -> list[Result]:
    """Return `function` of consecutive slices of `count` images, in their order.

    A slice has at most `batch_size` images. On a CPU that number is shared by the workers, so that all of them together
    need the memory of one batch.
    """
    batch_size = min(batch_size, count)
    workers = workers_for(batch_size, device)
    share = -(-batch_size // workers)
    slices = [slice(first, first + share) for first in range(0, count, max(1, share))]
    with Workers(workers) as threads:
        return threads.map(function, slices)


def at_once(functions: Sequence[Callable[[], Result]], device: str = "cpu") -> list[Result]:
    """Return the result of each function, in their order; on a CPU they run at once and share the threads of PyTorch.

    A function must not depend on the global state of random number generators.
    """
    with Workers(min(len(functions), torch.get_num_threads()) if device == "cpu" else 1) as threads:
        return threads.map(lambda function: function(), functions)


@contextmanager
def single_thread() -> Iterator[None]:
    """Run PyTorch's operators on one thread within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Workers:
    """`count` threads that share the threads of PyTorch's operators; a single one is the thread that calls `map`."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.pool = ThreadPoolExecutor(max(1, count), thread_name_prefix="worker")  # starts no thread before it is used

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Part], Result], parts: Iterable[Part]) -> list[Result]:
        """Return `function` of each part in the order of `parts`; the first error is raised.

        Autocast and inference mode belong to a thread, so `function` enters them itself.
        """
        if self.count <= 1:
            return [function(part) for part in parts]
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // self.count))  # a new thread starts with the number that is set then
        try:
            return list(self.pool.map(function, parts))
        finally:
            torch.set_num_threads(threads)


class NoiseAhead:
    """The values of `draw`, in its order, as tensors on `device`, drawn while the network is busy with the step before.

    Drawing the noise of 500 images takes 17 ms on the host, about as long as a step of a small network on a GPU.
    With `ahead` the next ones are drawn while the caller works, from the first call on; the last ones are not used.
    NumPy releases the global interpreter lock while it draws. Use it in a `with` block, which ends the thread.
    """

    def __init__(self, draw: Callable[[], np.ndarray], device: str, ahead: bool) -> None:
        self.draw, self.device = draw, device
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="noise") if ahead else None
        self.waiting: Future[torch.Tensor] | None = None

    def __enter__(self) -> NoiseAhead:
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def __call__(self) -> torch.Tensor:
        if self.pool is None:
            return self._drawn().to(self.device)
        drawn = self._drawn() if self.waiting is None else self.waiting.result()
        self.waiting = self.pool.submit(self._drawn)
        return drawn.to(self.device, non_blocking=True)

    def _drawn(self) -> torch.Tensor:
        values = torch.from_numpy(self.draw())
        # From pinned memory the copy does not stop the device.
        return values.pin_memory() if self.pool is not None and self.device.startswith("cuda") else values
