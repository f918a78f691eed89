"""Commands of the project, called in the process of the tests, which has their packages loaded."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout

import pytest


def call(main: Callable[[], object], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Call the `main` of a command or stage with arguments; returns what a process of its own would have left."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    handler = signal.getsignal(signal.SIGTERM)  # a stage sets its own
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [main.__module__, *arguments])
        try:
            main()
        except SystemExit as left:
            code = left.code or 0
        finally:
            signal.signal(signal.SIGTERM, handler)
    if not isinstance(code, int):  # Python prints it and exits with 1
        err.write(f"{code}\n")
        code = 1
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
