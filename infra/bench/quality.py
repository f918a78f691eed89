"""Seconds of training until our samples reach the distance that the reference loop has at the end of its run.

The distance is the Frechet distance to the held-out images in the features of the project's judge: the same judge,
seeds, number of samples and sampler steps for both sides, with the averaged weights of each. Sampling and measuring are
not timed. Our training stops when it reaches the final distance of the reference.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, cast

import numpy as np

from infra.bench.contestant import Contestant, Side
from infra.bench.inputs import Inputs, key, parameters, prepare
from models.device import best_device
from models.images.pictures import grid, png_bytes
from models.images.pixels import to_uint8
from models.judges.judge import load_judge
from models.judges.metrics import frechet_distance
from models.noise.samplers import Sampling, samplers_of
from models.pipeline import load_pipeline
from tasks.pictures.images import load_pixels
from tasks.runtime import atomic
from tasks.runtime.progress import progress

if TYPE_CHECKING:
    from PIL import Image

    from infra.bench.schema import Curve, Point, Quality, QualityRun, Trained
    from models.pipeline import Pipeline
    from tasks.params import Params

FIRST_SEED = 5_000_000
CALIBRATION_STEPS = 20
SHOWN_STEPS = 25
"""Steps between two updates of the progress bar."""
PEER_BATCH = 32
ENDLESS = "train.steps=1000000"
"""More steps than any measurement makes."""
PICTURE_COLUMNS, PICTURE_ROWS = 10, 4


@dataclass(frozen=True)
class Measure:
    """How a distance is measured: `samples` images with `sampler_steps` network evaluations each."""

    samples: int
    sampler_steps: int
    samplers: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """One data set.

    The reference trains for `steps` steps, or for as many as fit into `minutes`. Ours plans its learning rate schedule
    for the steps of its preset, or for `share` of those minutes. `points` (reference) and `own_points` (ours)
    measurements are taken at equal distances.
    """

    work: Path
    preset: str
    archive: Path | None
    seeds: int
    steps: int
    minutes: float | None
    share: float
    points: int
    own_points: int
    measure: Measure
    overrides: tuple[str, ...] = ()


class Scale:
    """Measures pipelines on one data set with fixed seeds; `floor` is the distance of real training images."""

    def __init__(self, inputs: Inputs, params: Params, measure: Measure) -> None:
        self.how = measure
        self.device = best_device()
        self.judge = load_judge(inputs.judge, self.device)
        self.reference = self.judge.features(load_pixels(inputs.images, "test", params.image).pixels)
        train = load_pixels(inputs.images, "train", params.image)
        self.floor = self._to_reference(train.pixels[balanced(train.labels, measure.samples)])

    def distance(self, pipeline: Path) -> float:
        """The smallest distance over the samplers that the path of the model has, so that each side uses its best."""
        chosen = self._samplers_of(load_pipeline(pipeline))
        return min(self.distance_by(pipeline, sampler, self.how.sampler_steps)[0] for sampler in chosen)

    def picture(self, pipeline: Path) -> Image.Image:
        """A grid of unguided samples, which have the same seeds and labels whatever the model."""
        model, count = load_pipeline(pipeline, self.device), PICTURE_COLUMNS * PICTURE_ROWS
        sampling = Sampling(self._samplers_of(model)[0], self.how.sampler_steps)
        images = model.sample(range(FIRST_SEED, FIRST_SEED + count), _labels(model, count), sampling)
        return grid(to_uint8(images), PICTURE_COLUMNS)

    def _samplers_of(self, model: Pipeline) -> list[str]:
        known = samplers_of(model.path)
        return [sampler for sampler in self.how.samplers if sampler in known]

    def distance_by(self, pipeline: Path, sampler: str, steps: int) -> tuple[float, float]:
        """Distance of the images of one sampler, and the seconds per image."""
        model, count = load_pipeline(pipeline, self.device), self.how.samples
        with progress(desc=f"draw: {sampler}", total=count * steps, unit="step", leave=False) as bar:
            began = time.perf_counter()
            images = model.sample(
                range(FIRST_SEED, FIRST_SEED + count),
                _labels(model, count),
                Sampling(sampler, steps),
                callback=lambda i, t, x, x0: bar.update(len(x)),
            )
            seconds = time.perf_counter() - began
        return self._to_reference(to_uint8(images)), seconds / count

    def _to_reference(self, pixels: np.ndarray) -> float:
        return float(f"{frechet_distance(self.judge.features(pixels), self.reference):.5g}")


def _labels(model: Pipeline, count: int) -> list[int] | None:
    """The classes in turn; None for a model without labels."""
    return [i % len(model.info.classes) for i in range(count)] if model.info.conditioning == "label" else None


def balanced(labels: np.ndarray, count: int) -> np.ndarray:
    """Random rows of `count` images with as equal class counts as possible, like the labels of the samples.

    Args:
        labels: int64 [N].
        count: Number of rows.

    Returns:
        int64 [min(count, N)].
    """
    order = np.random.default_rng(FIRST_SEED).permutation(len(labels))
    turn = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        of_class = labels[order] == label
        turn[of_class] = np.arange(of_class.sum())
    return cast("np.ndarray", order[np.argsort(turn, kind="stable")[:count]])


def measure(plan: Plan) -> Quality:
    """Train both sides with every seed; returns the curves and the ratios of the training times."""
    ours = parameters(plan.preset, plan.archive, *plan.overrides)
    inputs = prepare(plan.work, ours, judge=True)
    scale = Scale(inputs, ours, plan.measure)
    runs = [_one_seed(plan, seed, inputs, scale) for seed in range(plan.seeds)]
    ratios = [run["ratio"] for run in runs if run["ratio"] is not None]
    by_cpu_time = [run["ratio_by_cpu_time"] for run in runs if run["ratio_by_cpu_time"] is not None]
    return {
        "runs": runs,
        "floor": scale.floor,
        "ratio": median(ratios) if len(ratios) == len(runs) else None,
        "ratio_by_cpu_time": median(by_cpu_time) if len(ratios) == len(runs) else None,
    }


def _one_seed(plan: Plan, seed: int, inputs: Inputs, scale: Scale) -> QualityRun:
    theirs = ["conditioning=none", "train.precision='no'", f"train.batch_size={PEER_BATCH}", f"train.seed={seed}"]
    steps = plan.steps
    if plan.minutes is not None:
        steps = _steps_in_minutes(plan.minutes, "peer", plan, theirs, inputs)
    peer = _run("peer", plan, [*theirs, *_of(steps)], inputs, scale)
    target = peer["curve"][-1]
    mine = [f"train.seed={seed}"]
    if plan.minutes is not None:
        mine += _of(_steps_in_minutes(plan.minutes * plan.share, "ours", plan, mine, inputs))
    ours = _run("ours", plan, mine, inputs, scale, stop_at=target["distance"])
    last = ours["curve"][-1]
    done = last["distance"] <= target["distance"]
    return {
        "seed": seed,
        "target": target["distance"],
        "peer": peer,
        "ours": ours,
        "ratio": round(last["seconds"] / target["seconds"], 3) if done else None,
        "ratio_by_cpu_time": round(last["cpu_seconds"] / target["cpu_seconds"], 3) if done else None,
    }


def _of(steps: int) -> list[str]:
    """Overrides for a run of `steps` steps without checkpoints and samples, as in the reference."""
    return [f"train.steps={steps}", f"train.checkpoint_every={steps}", f"train.sample_every={steps}"]


def _steps_in_minutes(minutes: float, side: Side, plan: Plan, overrides: list[str], inputs: Inputs) -> int:
    params = parameters(plan.preset, plan.archive, *plan.overrides, *overrides, ENDLESS)
    return steps_in(60 * minutes, side, params, inputs, plan.work)


def steps_in(seconds: float, side: Side, params: Params, inputs: Inputs, work: Path) -> int:
    """Steps that a side makes in that time on an otherwise idle machine, estimated from a short trial.

    `params` have more steps than the time could allow. The number is stored, so that an interrupted run continues with
    the same one.
    """
    file = work / "runs" / f"steps-{key([side, seconds, params.model_dump(mode='json'), str(inputs.data)])}.json"
    if not file.exists():
        with Contestant(side, params, inputs, work / "scratch") as trial:
            trial.advance(CALIBRATION_STEPS // 4)
            step = trial.advance(CALIBRATION_STEPS).machine_seconds / CALIBRATION_STEPS
        atomic.write_json(file, max(CALIBRATION_STEPS, round(seconds / step)))
    return int(json.loads(file.read_text(encoding="utf-8")))


def _run(side: Side, plan: Plan, overrides: list[str], inputs: Inputs, scale: Scale, stop_at: float = 0.0) -> Curve:
    params = parameters(plan.preset, plan.archive, *plan.overrides, *overrides)
    points = plan.points if side == "peer" else plan.own_points
    return curve(side, params, inputs, scale, plan.work, points, stop_at)


def curve(
    side: Side, params: Params, inputs: Inputs, scale: Scale, work: Path, points: int, stop_at: float = 0.0
) -> Curve:
    """Train to the end, or until the distance is at most `stop_at`, and measure it `points` times.

    A finished run is stored in `work` and read from there the next time; beside it lies a grid of its samples.
    """
    name = key([side, params.model_dump(mode="json"), str(inputs.data), points, stop_at, scale.how.__dict__])
    file, pipeline = work / "runs" / f"{name}.json", work / "runs" / f"{name}-pipeline"
    if not file.exists():
        found = _trained(side, params, inputs, scale.distance, work / "scratch", pipeline, points, stop_at)
        picture = file.with_suffix(".png")
        atomic.write_bytes(picture, png_bytes(scale.picture(pipeline)))
        atomic.write_json(file, {**found, "picture": picture.name})
        shutil.rmtree(pipeline)
    return cast("Curve", json.loads(file.read_text(encoding="utf-8")))


def _trained(
    side: Side,
    params: Params,
    inputs: Inputs,
    distance: Callable[[Path], float],
    scratch: Path,
    pipeline: Path,
    points: int,
    stop_at: float,
) -> Trained:
    rows: list[Point] = []
    step, seconds, cpu = 0, 0.0, 0.0
    total = params.train.steps
    bar = progress(desc=f"train: {side}", total=total, unit="step")
    with bar, Contestant(side, params, inputs, scratch) as run:
        for point in range(1, points + 1):
            while step < round(total * point / points):
                block = run.advance(min(SHOWN_STEPS, round(total * point / points) - step))
                step, seconds, cpu = step + block.steps, seconds + block.seconds, cpu + block.cpu_seconds
                bar.update(block.steps)
            run.save(pipeline)
            found = distance(pipeline)
            rows.append({"step": step, "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "distance": found})
            bar.write(f"{side}: step {step} of {total}, {seconds:.1f} s, distance {found:.4g}")
            if found <= stop_at:
                break
    return {"steps": total, "batch_size": params.train.batch_size, "curve": rows}
