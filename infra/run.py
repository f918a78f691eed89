"""`make repro`: `dvc repro` with its output live, then what came out: times, memory, metrics, where things are.

    python -m infra.run [arguments of dvc repro]

The chain runs on the leash of `flows/leash.py`: Ctrl-C, a SIGTERM or the death of this process ends all of it,
and training saves a checkpoint first.
"""

from __future__ import annotations

import importlib.util
import json
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
from typing import IO, Any

import psutil
import yaml

from flows.repro import LEASH, dvc
from tasks import loopback, store, workspace
from tasks.redaction import redacted
from tasks.stage import StageError

SAMPLE_SECONDS = 1.0
METRICS = Path("reports/metrics.json")
RESULTS = (
    (re.compile(rb"^Running stage '([\w-]+)'"), "ran"),
    (re.compile(rb"^Stage '([\w-]+)' is cached - skipping run"), "cached"),
    (re.compile(rb"^Stage '([\w-]+)' didn't change, skipping"), "unchanged"),
)
# Each metric, and what it is to be read against.
BESIDE = (
    ("frechet_distance", "frechet_distance_floor", "floor"),
    ("kid", "kid_floor", "floor"),
    ("inception_style_score", "inception_style_score_real", "real images"),
    ("clip_score", "clip_score_real", "real images"),
    ("label_accuracy", "label_accuracy_real", "real images"),
)


@dataclass
class Stage:
    result: str = "not reached"
    seconds: float = 0.0


@dataclass
class Chain:
    """What the output of `dvc repro` tells: which stage ran, for how long, and what `register` said."""

    stages: dict[str, Stage]
    registered: str = ""
    _running: Stage | None = None
    _since: float = 0.0

    def read(self, line: bytes) -> None:
        for pattern, result in RESULTS:
            if found := pattern.match(line):
                self.close()
                stage = self.stages.setdefault(found.group(1).decode(), Stage())
                stage.result = result
                if result == "ran":
                    self._running, self._since = stage, time.monotonic()
        if line.startswith(b"register: ") and b" version " in line:
            self.registered = line.decode(errors="replace").strip().removeprefix("register: ")

    def close(self, failed: bool = False) -> None:
        """The stage that runs, if one does, has ended."""
        if self._running:
            self._running.seconds = time.monotonic() - self._since
            self._running.result = "FAILED" if failed else self._running.result
            self._running = None


class Memory(threading.Thread):
    """Peak memory of a process and all below it.

    On Linux the sum of proportional set sizes: a page that n processes share counts 1/n in each, so once in all.
    Elsewhere the sum of unique set sizes. A sum of resident sizes would count shared libraries once per process.
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
                continue  # it has ended meanwhile


def main() -> int:
    print("repro: the chain of dvc.yaml", flush=True)
    loopback.exempt(os.environ)
    if not (getattr(importlib.util.find_spec("mlflow"), "origin", None) or "").endswith("__init__.py"):
        sys.exit("repro: error: the package mlflow is not installed; run 'make install'")
    try:
        store.require_usable(workspace.tracking_uri())
    except StageError as error:
        sys.exit(f"repro: error: {redacted(str(error))}")
    began = time.monotonic()
    chain = Chain({name: Stage() for name in yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]})
    with leashed(dvc("repro", *sys.argv[1:])) as process:
        memory = Memory(process.pid)
        memory.start()
        assert process.stdout is not None
        try:
            for line in passed_on(process.stdout):
                chain.read(line)
            code = process.wait()
        finally:
            memory.stop()
    chain.close(failed=code != 0)
    print_times(chain, time.monotonic() - began, memory)
    if code:
        failed = [name for name, stage in chain.stages.items() if stage.result == "FAILED"]
        where = f"in stage '{failed[0]}'" if failed else "before a stage began"
        print(f"repro: stopped {where}; the reason is above, and the same command goes on from here", file=sys.stderr)
        return 1
    if chain.registered:
        print_results(chain)
    return 0


@contextmanager
def leashed(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command` with its output in a pipe; Ctrl-C and SIGTERM end it and everything below it, then this."""
    width = shutil.get_terminal_size().columns
    process = subprocess.Popen(
        [sys.executable, "-I", str(LEASH), *command],
        env={**os.environ, "COLUMNS": str(width - 1), "PYTHONUNBUFFERED": "1"},  # progress bars know the width
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdin is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        # Letting go of the leash ends the processes; their last words still come through the pipe.
        signal.signal(number, lambda *_: process.stdin.close())  # type: ignore[union-attr]
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait()


def passed_on(stream: IO[bytes]) -> Iterator[bytes]:
    """Copy `stream` to standard output as it comes; yield its lines."""
    pending = b""
    while chunk := os.read(stream.fileno(), 65536):
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
        *whole, pending = re.split(rb"[\r\n]+", pending + chunk)
        yield from whole
    yield pending


def print_times(chain: Chain, seconds: float, memory: Memory) -> None:
    """The stages that were reached, and after a failure those that were not; nothing of what was not asked for."""
    failed = any(stage.result == "FAILED" for stage in chain.stages.values())
    shown = {name: stage for name, stage in chain.stages.items() if failed or stage.result != "not reached"}
    print(f"\n{'stage':<12}{'result':<14}{'seconds':>8}")
    for name, stage in shown.items():
        print(f"{name:<12}{stage.result:<14}{f'{stage.seconds:.1f}' if stage.seconds else '':>8}")
    print(f"{'in all':<26}{seconds:>8.1f}")
    shared = "shared pages counted once" if memory.kind == "pss" else "without shared pages"
    print(f"peak memory of the process tree: {memory.peak / 2**20:,.0f} MiB ({shared}, every {SAMPLE_SECONDS:.0f} s)")


def print_results(chain: Chain) -> None:
    if METRICS.exists():
        print()
        print_metrics(json.loads(METRICS.read_text(encoding="utf-8")))
    print()
    for what, where in [("registered", chain.registered), *places()]:
        print(f"{what:<13}{where}")


def print_metrics(metrics: dict[str, Any]) -> None:
    print(f"{'metric':<24}{'value':>10}")
    for name, other, label in BESIDE:
        if name in metrics:
            beside = f"   {label} {metrics[other]:.4g}" if other in metrics else ""
            print(f"{name:<24}{metrics[name]:>10.4g}{beside}")
    print(f"{'samples':<24}{metrics['n_samples']:>10}   fingerprint {str(metrics['fingerprint'])[:12]}")
    for name, reason in sorted(metrics.get("not_applicable", {}).items()):
        print(f"{name:<24}{'-':>10}   {reason}")


def places() -> Iterator[tuple[str, str]]:
    yield "report", "reports/index.html"
    yield "pictures", "reports/figures/"
    yield "ONNX bundle", "outputs/onnx/   draw: cd outputs/onnx && python -m afterimage_bundle.bundle --help"
    yield "MLflow UI", "make ui, then http://127.0.0.1:5000"


if __name__ == "__main__":
    sys.exit(main())
