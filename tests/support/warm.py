"""Trainings as processes that begin at once: forks of a process that has loaded the packages, which takes seconds.

For tests that kill or signal a training. What happens while packages are loaded needs a process of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "accelerate", "diffusers", "mlflow", "PIL.Image", "safetensors.torch"])


class WarmProcess:
    """`python -m tasks.train` with `arguments`, in a session of its own; has methods of `subprocess.Popen`.

    What it prints goes to the file `log`.
    """

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self._log = log
        self._process = _CONTEXT.Process(target=_train, args=(arguments, environment, log))
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def output(self) -> str:
        """What it has printed so far, errors included."""
        return self._log.read_text(encoding="utf-8") if self._log.exists() else ""


def _train(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """The process: everything that differs between the forked one and a new one is set before the stage starts."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["tasks.train", *arguments]

    from tasks.runtime import stage
    from tasks.train import train

    stage.main(train)
