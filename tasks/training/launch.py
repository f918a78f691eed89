"""Training in several processes through accelerate's launcher, with the signals and exit codes of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tasks.runtime import parent

LAUNCHER = "AFTERIMAGE_LAUNCHER"
"""Environment variable of the processes that the launcher starts: the launcher's process number."""
SAVE_SECONDS = 600
"""The launcher kills a process this long after a signal; saving a large checkpoint takes minutes."""
CONFIGURATION = "AFTERIMAGE_ACCELERATE"
"""Environment variable with accelerate's configuration file, such as infra/accelerate/multi_gpu.yaml."""


def through_accelerate(module: str) -> None:
    """Run this command, `python -m module ...`, through accelerate's launcher if `CONFIGURATION` is set.

    Exits with the code of the processes; returns if the variable is not set. SIGTERM and SIGINT are passed on to the
    processes, which save a checkpoint and exit. Each process has a separate session, which signals to the launcher's
    group do not reach, and also ends when the launcher is killed.
    """
    configuration = os.environ.pop(CONFIGURATION, None)  # the started processes must not launch again
    if not configuration:
        if launcher := os.environ.pop(LAUNCHER, None):
            parent.end_with_parent(parent=int(launcher))
        return
    name = module.rpartition(".")[2]
    if not Path(configuration).is_file():
        sys.exit(f"{name}: error: {CONFIGURATION} names {configuration}, which is not a file; see infra/accelerate")
    parent.end_with_dvc()
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVE_SECONDS))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _pass_on)
    try:
        sys.exit(_exit_code(configuration, module))
    except (ValueError, TypeError, KeyError) as error:
        sys.exit(f"{name}: error: accelerate cannot read {configuration} ({' '.join(str(error).split())}); correct it")


def _exit_code(configuration: str, module: str) -> int:
    """Run the processes; returns the exit code of the first one that failed, or 0."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = ["--config_file", configuration, "-m", module, *sys.argv[1:]]
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except subprocess.CalledProcessError as error:
        return _as_shell(error.returncode)
    except ChildFailedError as error:
        return _as_shell(error.get_first_failure()[1].exitcode)
    except SignalException as error:
        return _as_shell(-error.sigval)
    return 0


def _as_shell(code: int) -> int:
    """Convert the exit code -n of a process that died of signal n to 128 + n, as shells do."""
    return 128 - code if code < 0 else code


def _pass_on(number: int, _: object) -> None:
    """Pass a signal on to the processes; exit if none has been started yet."""
    import psutil

    children = psutil.Process().children()
    for child in children:
        child.send_signal(number)
    if not children:
        sys.exit(_as_shell(-number))
