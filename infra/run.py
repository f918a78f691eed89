"""`make repro`: run `dvc repro` with its output live, then print a summary: times, memory, metrics, paths of results.

    python -m infra.run [arguments of dvc repro]

The chain runs on the leash of `tasks/runtime/leash.py`: Ctrl-C, a SIGTERM or the death of this process ends all of it,
and training saves a checkpoint first.
"""

from __future__ import annotations

import argparse
import codecs
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
import yaml

from flows import dvc, recover
from tasks.params import ParamsError
from tasks.params.redaction import redacted
from tasks.runtime import local_source, loopback, measures, store, workspace
from tasks.runtime.errors import StageError
from tasks.runtime.measures import SHORT_FINGERPRINT, Measurements

SAMPLE_SECONDS = 1.0
MEASUREMENTS = Path("reports/evaluation") / measures.FILE
SHOWN = ("frechet_distance", "kid", "cmmd", "inception_style_score", "clip_score", "label_accuracy")
"""Measures of the summary; the protocol's headline comes first."""


@dataclass
class Stage:
    """A row of the summary."""

    result: str = "not reached"
    seconds: float = 0.0


@dataclass
class Chain:
    """Which stage ran, for how long, and what `register` printed, read from the output of `dvc repro`."""

    stages: dict[str, Stage]
    registered: str = ""
    _running: Stage | None = None
    _since: float = 0.0

    def read(self, line: str) -> None:
        """Take one line of output into account."""
        if found := dvc.outcome(line):
            self.close()
            stage = self.stages.setdefault(found[0], Stage())
            stage.result = found[1]
            if found[1] == dvc.Outcome.RAN:
                self._running, self._since = stage, time.monotonic()
        if line.startswith("register: ") and " version " in line:
            self.registered = line.strip().removeprefix("register: ")

    def close(self, failed: bool = False) -> None:
        """End the stage that runs, if any."""
        if self._running:
            self._running.seconds = time.monotonic() - self._since
            self._running.result = "FAILED" if failed else self._running.result
            self._running = None


class Memory(threading.Thread):
    """Peak memory of a process and its descendants, in bytes.

    On Linux the sum of proportional set sizes: a page shared by n processes counts 1/n in each of them. Elsewhere the
    sum of unique set sizes. A sum of resident set sizes would count shared libraries once per process.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.kind = "pss" if sys.platform == "linux" else "uss"
        self.peak = 0
        self._root = psutil.Process(pid)
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, sum(self._sizes()))

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def _sizes(self) -> Iterator[int]:
        try:
            processes = [self._root, *self._root.children(recursive=True)]
        except psutil.Error:
            return
        for process in processes:
            try:
                yield getattr(process.memory_full_info(), self.kind)
            except psutil.Error:
                continue  # it has ended


def main() -> int:
    given = parse_arguments()
    print("repro: the chain of dvc.yaml", flush=True)
    loopback.exempt(os.environ)
    if not (getattr(importlib.util.find_spec("mlflow"), "origin", None) or "").endswith("__init__.py"):
        sys.exit("repro: error: the package mlflow is not installed; run 'make install'")
    require_repository()
    check_source(given)
    try:
        for repair in recover.recover(Path()):
            print(f"repro: {repair}", flush=True)
        store.require_usable(workspace.tracking_uri())
    except StageError as error:
        sys.exit(f"repro: error: {redacted(str(error))}")
    began = time.monotonic()
    chain = Chain({name: Stage() for name in yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]})
    with interruptible(dvc.command("repro", *given)) as running:
        memory = Memory(running.process.pid)
        memory.start()
        try:
            for line in passed_on(running.output):
                chain.read(line)
            code = running.process.wait()
        finally:
            memory.stop()
    chain.close(failed=code != 0)
    print_times(chain, time.monotonic() - began, memory)
    if code:
        failed = [name for name, stage in chain.stages.items() if stage.result == "FAILED"]
        where = f"in stage '{failed[0]}'" if failed else "before a stage began"
        print(f"repro: stopped {where}; the reason is above, and the same command continues from here", file=sys.stderr)
        return 1
    if chain.registered:
        print_results(chain)
    return 0


def parse_arguments() -> list[str]:
    """Arguments for `dvc repro`: all but `--help`, which prints the help of this command."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.run",
        usage="%(prog)s [-h] [arguments of dvc repro ...]",
        description="Run the whole chain with DVC, show its output live and print a summary.",
        epilog="Every other argument goes to `dvc repro`, such as the name of a stage, --force or --dry; "
        "`python -m dvc repro --help` lists them.",
        allow_abbrev=False,
    )
    return parser.parse_known_args()[1]


def check_source(given: list[str]) -> None:
    """Exit with one sentence for a source that DVC cannot hash; DVC itself prints a bare errno or waits for ever."""
    options = set(given)
    if options & {"-s", "--single-item"} and "download" not in options:
        return
    try:
        local_source.require_hashable(Path(), allow_missing=bool(options & {"--allow-missing", "--pull"}))
    except (StageError, ParamsError) as error:
        sys.exit(f"repro: error: {error}")


def require_repository() -> None:
    """Exit with one sentence outside of a Git repository, in which DVC does not start unless `no_scm` is set."""
    settings = (path.read_text(encoding="utf-8") for path in Path(".dvc").glob("config*"))
    if not Path(".git").exists() and not any("no_scm = true" in text.lower() for text in settings):
        sys.exit(
            "repro: error: this folder is not a Git repository, which DVC requires; clone the project with git, or "
            "run: git init && git add . && git commit -m start"
        )


@contextmanager
def interruptible(command: list[str]) -> Iterator[dvc.Leashed]:
    """Run `command` on a leash; Ctrl-C and SIGTERM end it and all its descendants, and then this process continues."""
    width = shutil.get_terminal_size().columns
    environment = {**os.environ, "COLUMNS": str(width - 1), "PYTHONUNBUFFERED": "1"}  # COLUMNS: for progress bars
    with dvc.leashed(command, environment) as running:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: running.end())
        yield running


def passed_on(stream: IO[bytes]) -> Iterator[str]:
    """Copy `stream` to standard output as it comes; yield its lines."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pending = ""
    while chunk := os.read(stream.fileno(), 65536):
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
        *whole, pending = re.split(r"[\r\n]+", pending + decoder.decode(chunk))
        yield from whole
    yield pending


def print_times(chain: Chain, seconds: float, memory: Memory) -> None:
    """Print the stages that were reached and, after a failure, those that were not."""
    failed = any(stage.result == "FAILED" for stage in chain.stages.values())
    shown = {name: stage for name, stage in chain.stages.items() if failed or stage.result != "not reached"}
    print(f"\n{'stage':<12}{'result':<14}{'seconds':>8}")
    for name, stage in shown.items():
        print(f"{name:<12}{stage.result:<14}{f'{stage.seconds:.1f}' if stage.seconds else '':>8}")
    print(f"{'in all':<26}{seconds:>8.1f}")
    shared = "shared pages counted once" if memory.kind == "pss" else "without shared pages"
    print(f"peak memory of the process tree: {memory.peak / 2**20:,.0f} MiB ({shared}, every {SAMPLE_SECONDS:.0f} s)")


def print_results(chain: Chain) -> None:
    if MEASUREMENTS.exists():
        print()
        try:
            print_measures(measures.read(MEASUREMENTS))
        except StageError as error:
            print(f"repro: warning: {error}", file=sys.stderr)
    print()
    for what, where in [("registered", chain.registered), *places()]:
        print(f"{what:<13}{where}")
    if advice := no_baseline():
        print(f"\n{advice}")


def print_measures(measured: Measurements) -> None:
    print(f"{'measure':<24}{'guidance':>10}{'value':>10}{'samples':>10}")
    rows = {row.name: row for row in measured.rows(SHOWN)}
    for name in dict.fromkeys((measured.headline, *SHOWN)):
        if row := rows.get(name):
            beside = f"   {row.beside}" if row.reference else ""
            print(f"{name:<24}{row.guidance:>10}{row.value:>10.4g}{row.samples:>10}{beside}")
        elif name in measured.not_applicable:
            print(f"{name:<24}{'-':>10}{'-':>10}{'-':>10}   {measured.not_applicable[name]}")
    print(f"{'fingerprint':<24}{measured.fingerprint[:SHORT_FINGERPRINT]:>10}")


def no_baseline() -> str | None:
    """How to make this run the baseline of experiments; None if the last commit contains it, or without Git.

    `dvc exp show` and `dvc metrics diff` read the numbers of the last commit through its `dvc.lock`.
    """
    status = ["git", "status", "--porcelain", "--", "dvc.lock"]
    try:
        done = subprocess.run(status, capture_output=True, text=True, check=False)
    except OSError:
        return None
    if done.returncode or not done.stdout.strip():
        return None
    return (
        "experiments are compared with the last commit, which has different results; to make these the "
        "baseline: git add dvc.lock && git commit -m 'Results of this machine'"
    )


def places() -> Iterator[tuple[str, str]]:
    yield "report", "reports/index.html"
    yield "pictures", "reports/figures/"
    yield "ONNX bundle", "outputs/onnx/   draw: cd outputs/onnx && python -m afterimage_bundle.bundle --help"
    yield "MLflow UI", "make ui, then http://127.0.0.1:5000"


if __name__ == "__main__":
    sys.exit(main())
