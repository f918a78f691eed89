"""Limits of CPU time that hold on slow machines and beside other processes."""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(argparse.__file__).read_text(encoding="utf-8")
ROUNDS = 2
PROBE_SECONDS = 0.009 * ROUNDS
"""What `probe` takes on the machine for which the limits of the tests are written, while it has nothing else to do."""


def probe() -> float:
    """CPU seconds in which this machine compiles a standard module `ROUNDS` times: work like that of imports."""
    began = time.process_time()
    for _ in range(ROUNDS):
        compile(SOURCE, "argparse.py", "exec")
    return time.process_time() - began


def used() -> float:
    """CPU seconds of this process and of the processes that it has waited for."""
    return sum(os.times()[:4])


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fail if the block takes more CPU seconds than `seconds`, scaled by how slow the machine is before and after it.

    A core that shares its units with another process counts more CPU seconds for the same work, up to twice as many.
    """
    before, began = probe(), used()
    yield
    took = used() - began
    if took < seconds:
        return
    allowed = seconds * max(1.0, (before + probe()) / 2 / PROBE_SECONDS)
    assert took < allowed, f"{took:.2f} CPU seconds, allowed are {allowed:.2f}"
