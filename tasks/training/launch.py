"""Training in the processes that a configuration of accelerate asks for, told and ended as if it were one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tasks.runtime import stage

CONFIGURATION = "AFTERIMAGE_ACCELERATE"
"""The environment variable that names the configuration, such as infra/accelerate/multi_gpu.yaml."""


def through_accelerate(module: str) -> None:
    """Start this command, `python -m module ...`, again through accelerate's launcher where `CONFIGURATION` is set,
    and leave with the exit code of what it started; return where it is not set.

    SIGTERM and SIGINT reach the processes, which save and end with codes of their own.
    """
    configuration = os.environ.pop(CONFIGURATION, None)  # not for the processes that it starts
    if not configuration:
        return
    name = module.rpartition(".")[2]
    if not Path(configuration).is_file():
        sys.exit(f"{name}: error: {CONFIGURATION} names {configuration}, which is no file; see infra/accelerate")
    stage.end_with_parent()
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
    import psutil

    for child in psutil.Process().children():
        child.send_signal(number)
