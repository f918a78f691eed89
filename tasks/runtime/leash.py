"""Run a command so that neither it nor anything that it started outlives the process that asked for it.

    python -I tasks/runtime/leash.py [--grace SECONDS] COMMAND ...

The asking process holds the writing end of this process's standard input. When that end closes, because the asking
process closed it, ended or was killed, the whole process group of the command is ended: SIGTERM, so that training can
save a checkpoint, then SIGKILL after the grace period. The exit code is that of the command.

`dvc` needs this: a signal to it alone orphans the stage, and the next `dvc repro` would start a second trainer.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started by its path; an isolated Python has the project on no path
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from tasks.runtime.parent import end_with_parent

GRACE_SECONDS = 15.0
POLL_SECONDS = 0.05
ENDED = 143

_PR_SET_CHILD_SUBREAPER = 36


class Ended(BaseException):
    """The asking process is gone or a signal arrived: end the command."""


def command_line(command: Sequence[str], grace_seconds: float = GRACE_SECONDS) -> list[str]:
    """The command line that runs `command` on the leash. Start it with a pipe as standard input."""
    return [sys.executable, "-I", str(Path(__file__).resolve()), "--grace", str(grace_seconds), *command]


def main(command: Sequence[str], grace_seconds: float) -> int:
    """Run `command` until it ends by itself or the asking process is gone; returns its exit code, or `ENDED`."""
    signal.signal(signal.SIGTERM, _raise_ended)
    if sys.platform == "linux":
        # Orphans of the group become children of this process, which reaps them: in a container nothing else may.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    child = None
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - there is one thread up to here, so this is safe
        )
        threading.Thread(target=_watch_asking_process, daemon=True).start()
        code = child.wait()
        return code if code >= 0 else 128 - code
    except Ended:
        return ENDED
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if child is not None:
            end_group(child.pid, grace_seconds)


def _watch_asking_process() -> None:
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def _raise_ended(*_: object) -> None:
    raise Ended


def end_group(group: int, grace_seconds: float = GRACE_SECONDS) -> None:
    """End every process of a group: SIGTERM, and SIGKILL after `grace_seconds`; returns when none is left."""
    only_ask = 0
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = _signal_group(group, number)
        deadline = time.monotonic() + grace_seconds
        while left and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            left = _signal_group(group, only_ask)
        if not left:
            return


def _signal_group(group: int, number: int) -> bool:
    """Reap the ended processes of a group and send a signal to the others; False if there are no others."""
    try:
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass  # one more is reaped
    except ChildProcessError:
        pass  # no process of the group is a child of this one
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -I tasks/runtime/leash.py",
        description="Run a command that ends, with all it started, when standard input closes.",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=GRACE_SECONDS,
        metavar="SECONDS",
        help=f"time between SIGTERM and SIGKILL (default {GRACE_SECONDS:g})",
    )
    parser.add_argument("command", help="program to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    return parser.parse_args()


if __name__ == "__main__":
    given = _arguments()
    sys.exit(main([given.command, *given.arguments], given.grace))
