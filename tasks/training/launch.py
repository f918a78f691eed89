"""Training in the processes that a configuration of accelerate asks for, told and ended as if it were one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tasks.runtime import parent

LAUNCHER = "AFTERIMAGE_LAUNCHER"
"""Set for the processes that the launcher starts: its process number."""
SAVE_SECONDS = 600
"""The launcher kills a process that has not ended this long after a signal; a large checkpoint takes minutes."""
CONFIGURATION = "AFTERIMAGE_ACCELERATE"
"""The environment variable that names the configuration, such as infra/accelerate/multi_gpu.yaml."""


def through_accelerate(module: str) -> None:
    """Start this command, `python -m module ...`, again through accelerate's launcher where `CONFIGURATION` is set,
    and leave with the exit code of what it started; return where it is not set.

    SIGTERM and SIGINT reach the processes, which save and end with codes of their own. They also end when the
    launcher is killed: each is in a session of its own, so that a signal to the launcher's group does not reach it.
    """
    configuration = os.environ.pop(CONFIGURATION, None)  # not for the processes that it starts
    if not configuration:
        if launcher := os.environ.pop(LAUNCHER, None):
            parent.end_with_parent(parent=int(launcher))
        return
    name = module.rpartition(".")[2]
    if not Path(configuration).is_file():
        sys.exit(f"{name}: error: {CONFIGURATION} names {configuration}, which is no file; see infra/accelerate")
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
    """Of the process that was started, of several that of the first one that failed; 0 where none did."""
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
    """The exit code of a process that died of signal n, -n, as a shell gives it: 128 + n."""
    return 128 - code if code < 0 else code


def _pass_on(number: int, _: object) -> None:
    """Pass a signal on to the processes; leave where none has been started yet, as nobody else would obey it."""
    import psutil

    children = psutil.Process().children()
    for child in children:
        child.send_signal(number)
    if not children:
        sys.exit(_as_shell(-number))
