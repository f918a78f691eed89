"""How signals end a training run: after a whole step, and in all processes after the same step."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tasks.training.run import Run

ASK_SECONDS, ASK_STEPS = 1.0, 10
"""How often several processes exchange whether a signal arrived, and the most steps in between."""


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Collect the numbers of SIGTERM and SIGINT in a list, which the training loop reads after each step."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: received.append(n)) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """Call it after each step: whether a signal arrived in any process.

    The exchange between processes takes time, so it happens about once a second, and at least every `ASK_STEPS` steps
    so that slow steps do not delay a signal. All processes see the same sums, so they agree on the step of the next
    exchange. They exchange through the network of their hosts (gloo): a GPU would have to finish its queue first.
    """

    def __init__(self, run: Run, received: list[int]) -> None:
        self.run, self.received = run, received
        self.steps, self.began = 1, time.monotonic()
        self.next = run.step + self.steps
        several = run.accelerator.num_processes > 1
        self.hosts = torch.distributed.new_group(backend="gloo") if several else None

    def __call__(self) -> bool:
        accelerator = self.run.accelerator
        if accelerator.num_processes == 1:
            return bool(self.received)
        if self.run.step < self.next:
            return False
        milliseconds = round((time.monotonic() - self.began) * 1000)
        sums = torch.tensor([len(self.received), milliseconds])
        torch.distributed.all_reduce(sums, group=self.hosts)
        signals, total = sums.tolist()
        seconds_per_step = max(1, total) / accelerator.num_processes / self.steps / 1000
        self.steps, self.began = min(max(1, int(ASK_SECONDS / seconds_per_step)), ASK_STEPS), time.monotonic()
        self.next = self.run.step + self.steps
        return signals > 0
