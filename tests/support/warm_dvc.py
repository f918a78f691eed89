"""`dvc repro` as a fork of a process that has loaded the packages, and its stages as forks of that one.

They are processes like those of a command line: a group of their own, a stage is the child of DVC, and each may be
killed. Only the start differs, which would take most of the time of a drill.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import shlex
import signal
import sys
import threading
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

_CONTEXT = multiprocessing.get_context("forkserver")


def start(arguments: list[str], folder: Path, environment: dict[str, str], log: Path) -> BaseProcess:
    """Start `dvc` with `arguments` in `folder`, in a session of its own; what it prints goes to the file `log`."""
    # Not on import: the server is that of the whole process, and tests/support/warm.py needs fewer packages.
    _CONTEXT.set_forkserver_preload(["tests.support.warm_packages"])
    process = _CONTEXT.Process(target=_dvc, args=(arguments, folder, environment, log))
    process.start()
    return process


def _dvc(arguments: list[str], folder: Path, environment: dict[str, str], log: Path) -> NoReturn:
    os.setsid()
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _become(folder, environment)
    import dvc.cli
    import dvc.stage.run

    dvc.stage.run.subprocess = _Forks  # type: ignore[attr-defined] # what it starts is a stage
    sys.exit(dvc.cli.main(arguments))


class _Stage:
    """What DVC uses of `subprocess.Popen`."""

    returncode: int

    def __init__(self, command: list[str], *, cwd: str, env: dict[str, str], **_: Any) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._pid = os.fork()
        if self._pid == 0:
            _run(shlex.split(command[-1]), Path(cwd), env)

    def communicate(self) -> None:
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


class _Forks:
    """In the place of the module `subprocess` in DVC's module that runs stages."""

    Popen = _Stage


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> NoReturn:
    """Do what `python -m MODULE ARGUMENTS` does, then end."""
    os.closerange(3, 1024)  # among them the locks of DVC
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _become(folder, environment)
    assert command[:2] == ["python", "-m"], command
    sys.argv = command[2:]
    code = 1
    try:
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:  # Python prints and exits with 1 for KeyboardInterrupt, too
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _become(folder: Path, environment: dict[str, str]) -> None:
    """Set what a new process would have: folder, variables, and modules from the folder."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = str(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tasks", "models", "flows", "tests")]:
        if name != __name__:
            del sys.modules[name]
