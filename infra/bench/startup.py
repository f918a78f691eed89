"""Start-up time of the training command: until its help, and until the first optimizer step of the default preset."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import psutil

from infra.bench.inputs import Inputs, parameters, prepare
from tasks.formats.prior import FILE as PRIOR
from tasks.formats.prior import Prior
from tasks.preset import dump
from tasks.runtime.progress import progress

if TYPE_CHECKING:
    from infra.bench.schema import Startup

PRESET = "digits"
GIVE_UP = 300
POLL = 0.005


@dataclass(frozen=True)
class Plan:
    """Start the command `repeats` times."""

    work: Path
    repeats: int
    overrides: tuple[str, ...] = ()


def measure(plan: Plan) -> Startup:
    """Median start-up times."""
    params = parameters(PRESET, None, *plan.overrides, "train.checkpoint_every=1")
    inputs = prepare(plan.work, params)
    with tempfile.TemporaryDirectory(dir=plan.work) as folder:
        here = Path(folder)
        (here / "params.yaml").write_text(dump(params.model_dump(mode="json", by_alias=True), PRESET), encoding="utf-8")
        bar = progress(desc="start-up", total=2 * plan.repeats + 1, unit="start")
        fresh = _first_step(here, inputs, "fresh")
        bar.update()
        helps, steps = [], []
        for number in range(plan.repeats):
            helps.append(_help())
            bar.update()
            steps.append(_first_step(here, inputs, f"scratch-{number}"))
            bar.update()
        bar.close()
    return {
        "help_seconds": round(median(seconds for seconds, _ in helps), 3),
        "help_cpu_seconds": round(median(cpu for _, cpu in helps), 3),
        "first_step_seconds": round(median(steps), 2),
        "first_step_seconds_with_an_empty_mlflow": round(fresh, 2),
        "repeats": plan.repeats,
    }


def _help() -> tuple[float, float]:
    """Wall-clock and CPU seconds of `python -m tasks.train --help`."""
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "tasks.train", "--help"], check=True, stdout=subprocess.DEVNULL)
    after, seconds = os.times(), time.perf_counter() - began
    return seconds, after.children_user + after.children_system - before.children_user - before.children_system


def _first_step(here: Path, inputs: Inputs, scratch: str) -> float:
    """Seconds from the command to its first checkpoint, which is asked for after one step."""
    command = [sys.executable, "-m", "tasks.train", *arguments(here, inputs)]
    environment = os.environ | {
        "AFTERIMAGE_SCRATCH": str(here / scratch),
        "MLFLOW_TRACKING_URI": f"sqlite:///{here / 'mlflow.db'}",
    }
    with (here / "output.txt").open("w", encoding="utf-8") as output:
        began = time.perf_counter()
        process = psutil.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            made = lambda: any((here / scratch).glob("train/*/step-*/manifest.json"))  # noqa: E731
            return _waited_for(made, process, began)
        finally:
            with suppress(psutil.NoSuchProcess):  # it ended by itself
                process.terminate()
            process.wait()


def arguments(here: Path, inputs: Inputs) -> list[str]:
    """Arguments of a training that reads `inputs` and `here`/params.yaml, and writes into `here`."""
    Prior().write(here / "prior" / PRIOR)
    made = [here / name for name in ("prior", "pipeline", "averages", "report")]
    paths = [inputs.latents, inputs.codec, inputs.accepted, *made]
    return [*map(str, paths), "--params", str(here / "params.yaml")]


def _waited_for(made: Callable[[], bool], process: psutil.Popen, began: float) -> float:
    while not made():
        if process.poll() is not None or time.perf_counter() - began > GIVE_UP:
            raise RuntimeError("the training command made no step; run `python -m tasks.train` to see its error")
        time.sleep(POLL)
    return time.perf_counter() - began
