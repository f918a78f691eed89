"""End a process when the process that started it dies, also if that one is killed outright (Linux only).

On other systems these functions only check whether the parent is still alive. The module imports the standard library
alone, because `tasks/runtime/leash.py` uses it in an isolated Python.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(number: int = signal.SIGTERM, parent: int | None = None) -> None:
    """Have the kernel send the signal `number` to this process when its parent dies.

    `parent` is the process id of the expected parent. If another process is the parent by now, the expected one died
    before this call, and the signal is sent at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number))
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), number)


def end_with_dvc() -> None:
    """Have the kernel end this process when the `dvc` that started it dies, so that no orphan continues to train."""
    if "DVC_STAGE" in os.environ:
        end_with_parent()
