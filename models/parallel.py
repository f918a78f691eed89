"""Work that several threads do at once: on the cores of a CPU, or on the GPUs of a machine.

On a CPU each thread computes a part of a batch, or a whole training, without parallel operators. With several GPUs each
has a thread and a copy of the networks, and takes the next batch when it is done with the one before (`over_devices`);
PyTorch releases the global interpreter lock within its operators. One more thread per GPU draws the noise of the next
step (`NoiseAhead`).

The operators of a small network are too short to gain from a second thread. Two halves of a batch, each computed by a
single thread, take about 0.6 times as long as the whole batch with two threads.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch

from models.device import devices_of, enter

if TYPE_CHECKING:
    import numpy as np

LEAST_IMAGES = 16
"""Images per worker; with fewer, Python's share of the time grows, which only one thread can spend at once."""

Copy = TypeVar("Copy")
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


def over_devices(
    function: Callable[[Copy, slice], Result],
    copy: Callable[[str], Copy],
    count: int,
    batch_size: int,
    device: str = "cpu",
) -> list[Result]:
    """Return `function(copy(name), part)` of the slices of `over_batches`, computed by all that `device` stands for.

    `copy(name)` returns what `function` needs on one of `devices_of(device)`, and is called at most once for each. The
    slices are the same for any number of GPUs, and so are the results as far as two GPUs compute the same.
    """
    if len(devices_of(device)) == 1:
        return over_batches(functools.partial(function, copy(device)), count, batch_size, device)
    return over_whole_batches(function, copy, count, batch_size, device)


def over_whole_batches(
    function: Callable[[Copy, slice], Result],
    copy: Callable[[str], Copy],
    count: int,
    batch_size: int,
    device: str = "cpu",
) -> list[Result]:
    """Return what `over_devices` does, in batches that the workers of a CPU do not share."""
    slices = [slice(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
    return shared_out(lambda name: functools.partial(function, copy(name)), slices, device)


def on_devices(functions: Sequence[Callable[[str], Result]], device: str) -> list[Result]:
    """Return the result of each function of a device's name, in their order; with several GPUs they run at once."""
    return shared_out(lambda name: lambda function: function(name), functions, device)


def shared_out(worker: Callable[[str], Callable[[Part], Result]], parts: Sequence[Part], device: str) -> list[Result]:
    """Return `worker(name)(part)` of each part, in their order; with several GPUs they run at once.

    Each GPU has a thread, which takes the next part when it is free. After an error no further part is begun.
    """
    names = devices_of(device)[: len(parts)]
    if len(names) <= 1:
        compute = worker(device)
        return [compute(part) for part in parts]
    results: dict[int, Result] = {}
    waiting, lock, stop = iter(range(len(parts))), threading.Lock(), threading.Event()

    def work(name: str) -> None:
        try:
            enter(name)
            compute = worker(name)
            while not stop.is_set():
                with lock:
                    number = next(waiting, None)
                if number is None:
                    return
                results[number] = compute(parts[number])
        finally:
            stop.set()  # after an error; otherwise no part waits

    with ThreadPoolExecutor(len(names), thread_name_prefix="device") as pool:
        futures = [pool.submit(work, name) for name in names]
        try:
            for future in futures:
                future.result()
        finally:
            stop.set()  # after an error or an interrupt the block waits for the parts that have begun
    return [results[number] for number in range(len(parts))]


def shared_in_turns(
    worker: Callable[[str], Callable[[Part], Result]], parts: Sequence[Part], device: str
) -> Iterator[Result]:
    """Yield what `shared_out` returns, computing as many parts at a time as there are devices.

    So the caller can store each result before the next ones are computed.
    """
    number = len(devices_of(device))
    for first in range(0, len(parts), number):
        yield from shared_out(worker, parts[first : first + number], device)


def at_once(functions: Sequence[Callable[[str], Result]], device: str = "cpu") -> list[Result]:
    """Return the result of each function of a device's name, in their order, several of them at once.

    On a CPU they share the threads of PyTorch; of several GPUs each takes the next function when it is free. A function
    must not depend on the global state of random number generators.
    """
    if device != "cpu":
        return on_devices(functions, device)
    with Workers(min(len(functions), torch.get_num_threads())) as threads:
        return threads.map(lambda function: function(device), functions)


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
