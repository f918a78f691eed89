"""Run a command so that neither it nor anything that it started outlives whoever asked for it.

    python -I flows/leash.py COMMAND ...

The asker holds the writing end of this process's standard input. When that closes, because the asker closed
it, ended, or was killed outright, the command's whole process group is ended: SIGTERM, so that training can save
a checkpoint, then SIGKILL. It leaves with the command's exit code.

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

GRACE_SECONDS = 15.0
POLL_SECONDS = 0.05
ENDED = 143

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class Ended(BaseException):
    """The asker is gone or a signal arrived: end the command."""


def main(command: list[str]) -> int:
    """Run `command` until it ends by itself or the asker is gone; returns its exit code, or `ENDED`."""
    signal.signal(signal.SIGTERM, _raise_ended)
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if libc is not None:
        # Orphans of the group come here to be reaped: in a container, nobody else may do that.
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def end_with_leash() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    child = None
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=end_with_leash,  # noqa: PLW1509 - one thread runs until here, so this is safe
        )
        threading.Thread(target=_watch_asker, daemon=True).start()
        code = child.wait()
        return code if code >= 0 else 128 - code
    except Ended:
        return ENDED
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if child is not None:
            end_group(child.pid)


def _watch_asker() -> None:
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def _raise_ended(*_: object) -> None:
    raise Ended


def end_group(group: int, grace_seconds: float = GRACE_SECONDS) -> None:
    """End every process of a group: SIGTERM, and SIGKILL after the grace; returns when none is left."""
    only_ask = 0
    for number in (signal.SIGTERM, signal.SIGKILL):
        somebody = _signal_group(group, number)
        deadline = time.monotonic() + grace_seconds
        while somebody and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            somebody = _signal_group(group, only_ask)
        if not somebody:
            return


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to a group after reaping its dead; False when nobody is left."""
    try:
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass  # one more is reaped
    except ChildProcessError:
        pass  # none of the group is a child of ours
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _command() -> list[str]:
    parser = argparse.ArgumentParser(
        prog="python -I flows/leash.py",
        description="Run a command that ends, with all it started, when standard input closes.",
    )
    parser.add_argument("command", help="program to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    given = parser.parse_args()
    return [given.command, *given.arguments]


if __name__ == "__main__":
    sys.exit(main(_command()))
