"""One stage per GPU: the stages and trials of all runs on this machine take turns, whichever flow they belong to.

The limit is a lock file per GPU, which the kernel releases when its holder ends, however it ends. A slot that Prefect's
server counts would stay taken for minutes after a kill.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tasks.runtime.errors import StageError

VISIBLE = "CUDA_VISIBLE_DEVICES"
ACCELERATE = "AFTERIMAGE_ACCELERATE"
"""Variable with a configuration of several processes: the stage `train` then uses all GPUs."""
LOCKS = Path(tempfile.gettempdir()) / f"afterimage-gpus-{os.getuid()}"
POLL_SECONDS = 0.5


def visible(environment: Mapping[str, str]) -> list[str]:
    """Names of the GPUs that a process with this environment could use; empty without an NVIDIA driver."""
    if VISIBLE in environment:
        return [name.strip() for name in environment[VISIBLE].split(",") if name.strip() not in ("", "-1")]
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return done.stdout.split()


@contextmanager
def lent(environment: Mapping[str, str], log: Callable[[str], None], stop: threading.Event) -> Iterator[dict[str, str]]:
    """Yield the environment of a stage with one GPU that no other stage uses, or all if it trains on several.

    Waits until they are free. Raises `StageError` if `stop` is set while it waits. Without a GPU nothing is locked.
    """
    names = visible(environment)
    several = ACCELERATE in environment
    with ExitStack() as stack:
        if several:  # always in this order, so that two such stages never wait for each other
            taken = [_taken([name], stack, log, stop) for name in names]
        else:
            taken = [_taken(names, stack, log, stop)] if names else []
        yield {**environment, VISIBLE: ",".join(taken)} if taken else dict(environment)


def _taken(names: list[str], stack: ExitStack, log: Callable[[str], None], stop: threading.Event) -> str:
    """Lock the first of the GPUs that is free until `stack` closes; returns its name."""
    LOCKS.mkdir(mode=0o700, exist_ok=True)
    logged = False
    while True:
        for name in names:
            file = (LOCKS / f"{name.replace('/', '-')}.lock").open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
            else:
                stack.enter_context(file)
                return name
        if stop.is_set():
            raise StageError("interrupted while it waited for a GPU")
        if not logged:
            log(f"waiting for a GPU: other stages use {', '.join(names)}")
            logged = True
        time.sleep(POLL_SECONDS)
