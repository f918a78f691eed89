"""The command line of a stage: arguments, parameters, one-sentence errors and exit codes.

A stage is one function. Its `Path` arguments are files and folders, in the order of `dvc.yaml`; its `Section` arguments
are the sections of `params.yaml` that it reads. `main(function)` is the command line made of them.
"""

from __future__ import annotations

import argparse
import errno
import gc
import inspect
import os
import shutil
import signal
import sys
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tasks.params import ParamsError, Section, load, names_of
from tasks.params.redaction import redacted
from tasks.runtime import consistency, loopback, parent, progress
from tasks.runtime.errors import Preempted, StageError

__all__ = ["FAILED", "INTERRUPTED", "PREEMPTED", "main", "paths_of", "sections_of"]

FAILED, PREEMPTED, INTERRUPTED = 1, 143, 130
MIN_NEW_OBJECTS = 50_000
"""New objects after which Python searches for garbage. At its default of 700, a seventh of the seconds in which a stage
loads its packages goes into searches that find nothing."""
_DISK_FULL = "no space left on the device{where}; free some, then run the same command again"
_LOST = "MLflow stopped answering; start it again, then run the same command, which adds what it lacks"
_DISK_FULL_WORDS = ("No space left on device", "os error 28", "database or disk is full", "Disk quota exceeded")


def sections_of(function: Callable[..., None]) -> list[str]:
    """Return the names of the sections, or of single parameters, that a stage function reads."""
    hints = typing.get_type_hints(function)
    arguments = inspect.signature(function).parameters
    return [key for name in arguments if _is_section(hints[name]) for key in names_of(hints[name])]


def paths_of(function: Callable[..., None]) -> list[str]:
    """Return the names of the `Path` arguments of a stage function, in order."""
    hints = typing.get_type_hints(function)
    return [name for name in inspect.signature(function).parameters if hints[name] is Path]


def main(function: Callable[..., None]) -> NoReturn:
    """Run a stage function from the command line, then exit."""
    arguments = _parser(function).parse_args()
    name = function.__name__
    parent.end_with_dvc()
    gc.set_threshold(MIN_NEW_OBJECTS)
    limit_openmp_spin()
    loopback.exempt(os.environ)
    signal.signal(signal.SIGTERM, _raise_preempted)
    try:
        params = load(arguments.params)
        paths = {path: getattr(arguments, path) for path in paths_of(function)}
        print(f"{name}: {' '.join(str(path) for path in paths.values())}", flush=True)
        consistency.require(name, paths, params)
        hints = typing.get_type_hints(function)
        sections = {
            argument: params.section(hints[argument])
            for argument in inspect.signature(function).parameters
            if _is_section(hints[argument])
        }
        function(**paths, **sections)
    except (StageError, ParamsError) as error:
        _leave(name, str(error), arguments.debug)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; the same command continues", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Preempted:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the exit
        print(f"\n{name}: terminated; the same command continues", file=sys.stderr)
        sys.exit(PREEMPTED)
    except OSError as error:
        _leave(name, _os_sentence(error), arguments.debug)
    except Exception as error:
        if is_disk_full(error):
            _leave(name, _DISK_FULL.format(where=""), arguments.debug)
        if _is_lost_connection(error):
            _leave(name, _LOST, arguments.debug)
        _leave(name, f"{type(error).__name__}: {error} (run again with --debug for the trace)", arguments.debug)
    sys.exit(0)


def _parser(function: Callable[..., None]) -> argparse.ArgumentParser:
    summary = inspect.getdoc(function) or function.__name__
    parser = argparse.ArgumentParser(
        prog=f"python -m tasks.{function.__name__}",
        description=summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for path in paths_of(function):
        parser.add_argument(path, type=Path, help="written in dvc.yaml")
    parser.add_argument(
        "--params", type=Path, default=Path("params.yaml"), help=f"reads: {', '.join(sections_of(function)) or '-'}"
    )
    parser.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    return parser


def _is_section(hint: object) -> bool:
    return isinstance(hint, type) and issubclass(hint, Section)


def _leave(name: str, sentence: str, debug: bool) -> NoReturn:
    progress.end_line()
    if debug:
        print(redacted(traceback.format_exc()), file=sys.stderr, end="")
    print(f"{name}: error: {' '.join(redacted(sentence).split())}", file=sys.stderr, flush=True)
    sys.exit(FAILED)


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception means a full disk.

    safetensors and SQLite raise other types than `OSError`, and `shutil.copytree` one without `errno`.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(words in str(error) for words in _DISK_FULL_WORDS)


def _is_lost_connection(error: Exception) -> bool:
    """Whether MLflow's client lost the connection to its server."""
    is_mlflow = type(error).__module__.partition(".")[0] == "mlflow"
    return is_mlflow and any(words in str(error) for words in ("Max retries exceeded", "failed with exception"))


def _os_sentence(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    if is_disk_full(error):
        return _DISK_FULL.format(where=where)
    if isinstance(error, FileNotFoundError):
        return f"a file is missing{where}; run 'dvc repro', which makes what this stage reads"
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):  # what `copytree` collected
        return str(error.args[0][0][-1])
    return f"{error.strerror or error}{where}"


def _raise_preempted(*_: object) -> NoReturn:
    raise Preempted


def limit_openmp_spin() -> None:
    """Limit the time that waiting OpenMP threads spin to about 50 us; must be called before torch is imported.

    Threads that spin for long occupy the core of the thread that they wait for: on a busy machine a training step of
    the digits takes 7 times as long. Threads that sleep at once must be woken thousands of times per step: on an idle
    machine the step takes 1.5 times as long. A spin as long as a wake-up is near-optimal on both. Values that are set
    in the environment are kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read by GNU OpenMP, which is part of PyTorch
