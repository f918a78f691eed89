"""Cost and quality of the samplers on one trained pipeline: seconds per image and Frechet distance."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from infra.bench.contestant import Contestant
from infra.bench.inputs import Inputs, key, parameters, prepare
from infra.bench.quality import Measure, Scale
from infra.bench.results import Piecewise
from models.noise.samplers import samplers_of
from models.pipeline import load_pipeline

if TYPE_CHECKING:
    from infra.bench.schema import Sampling, SamplingRow
    from tasks.params import Params

PRESET = "digits"
SAMPLERS = (
    ("euler", 5),
    ("euler", 10),
    ("euler", 20),
    ("heun", 5),
    ("heun", 10),
    ("dpm_solver_pp_2m", 10),
    ("dpm_solver_pp_2m", 15),
    ("dpm_solver_pp_2m", 20),
    ("ddim", 10),
    ("ddim", 50),
    ("ddpm", 1000),
)
"""Name and steps; a model is measured with those of its path, in at most as many steps as it has timesteps."""


@dataclass(frozen=True)
class Plan:
    """Without a `pipeline` of the digits, the preset is trained once, in `work`."""

    work: Path
    pipeline: Path | None
    samples: int
    overrides: tuple[str, ...] = ()


def measure(plan: Plan) -> Sampling:
    """Draw with every sampler and measure the distance."""
    params = parameters(PRESET, None, *plan.overrides)
    inputs = prepare(plan.work, params, judge=True)
    folder = plan.pipeline or _trained(plan, params, inputs)
    path = load_pipeline(folder).path
    known = samplers_of(path)
    chosen = [(name, min(steps, path.timesteps)) for name, steps in SAMPLERS if name in known]
    scale = Scale(inputs, params, Measure(plan.samples, 0, ()))
    scale.distance_by(folder, known[-1], 1)  # warm-up
    with Piecewise(plan.work / "pieces") as kept:
        rows = [kept.piece([plan.__dict__, *which], partial(_row, plan, folder, scale, *which)) for which in chosen]
    return {"rows": rows, "floor": scale.floor}


def _trained(plan: Plan, params: Params, inputs: Inputs) -> Path:
    folder = plan.work / f"pipeline-{key(params.model_dump(mode='json'))}"
    if not folder.exists():
        with Contestant("ours", params, inputs, plan.work / "scratch") as run:
            run.advance(params.train.steps)
            run.save(folder)
    return folder


def _row(plan: Plan, folder: Path, scale: Scale, sampler: str, steps: int) -> SamplingRow:
    distance, seconds = scale.distance_by(folder, sampler, steps)
    print(f"sampling: {sampler}, {steps} steps: {1 / seconds:.3g} img/s, distance {distance}", flush=True)
    return {
        "sampler": sampler,
        "steps": steps,
        "samples": plan.samples,
        "img_s": float(f"{1 / seconds:.4g}"),
        "seconds_per_image": float(f"{seconds:.4g}"),
        "distance": distance,
    }
