"""Ablations of the digits recipe: one choice changed at a time, with the same steps and measure, mean of seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from infra.bench.inputs import parameters, prepare
from infra.bench.quality import Measure, Scale, curve

if TYPE_CHECKING:
    from infra.bench.schema import LeverRow, Levers

PRESET = "digits"
DIFFUSION = "objective=diffusion"
DENSE = f"{DIFFUSION} diffusion.timestep_density=logit_normal"
ADAMW = "train.optimizer=adamw"
MIN_SNR = "diffusion.loss_weighting=min_snr diffusion.min_snr_gamma=2.0"
LEVERS = (
    ("path", f"{DENSE}"),
    ("timesteps", "diffusion.timestep_density=uniform"),
    ("timesteps", "diffusion.timestep_density=normal_log_snr diffusion.density_std=2.0"),
    ("timesteps", f"{DIFFUSION}"),
    ("optimizer", ADAMW),
    ("optimizer", f"{ADAMW} diffusion.timestep_density=uniform"),
    ("optimizer", f"{DENSE} {ADAMW}"),
    ("optimizer", "train.muon_learning_rate=0.01"),
    ("optimizer", "train.muon_learning_rate=0.04"),
    ("weighting", f"{DIFFUSION} {ADAMW} {MIN_SNR}"),
    ("weighting", f"{DENSE} {ADAMW} {MIN_SNR}"),
    ("weighting", f"{DIFFUSION} {ADAMW}"),
    ("objective", f"{DENSE} diffusion.prediction=epsilon"),
    ("objective", f"{DENSE} diffusion.prediction=sample"),
    ("schedule", f"{DENSE} diffusion.schedule=linear"),
    ("schedule", f"{DENSE} diffusion.schedule=sigmoid"),
    ("learning rate", "train.learning_rate=0.0001"),
    ("learning rate", "train.learning_rate=0.001"),
    ("learning rate", "train.learning_rate=0.008"),
    ("learning rate", "train.lr_schedule=constant"),
    ("EMA", "train.ema=[decay-0.9] train.pipeline_ema=decay-0.9"),
    ("EMA", "train.ema=[decay-0.999] train.pipeline_ema=decay-0.999"),
    ("EMA", "train.ema=[std-0.15] train.pipeline_ema=std-0.15"),
    ("batch", "train.batch_size=32"),
    ("condition", "conditioning=none"),
    ("network", "model.block_out_channels=[32,32,64]"),
    ("network", "model.block_out_channels=[32,64,64]"),
    ("network", "model.attention=[false,true,true]"),
    ("network", "model.layers_per_block=2"),
)


@dataclass(frozen=True)
class Plan:
    """`only` replaces the list of changes; an entry may have several overrides, separated by spaces."""

    work: Path
    steps: int
    seeds: int
    measure: Measure
    only: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


def measure(plan: Plan) -> Levers:
    """Train the recipe and each of its changes."""
    chosen = [("given", text) for text in plan.only] or LEVERS
    rows = [_row(plan, "the recipe", "")]
    for lever, change in chosen:
        rows.append(_row(plan, lever, change))
        print(f"levers: {change}: distance {rows[-1]['distance']} (recipe {rows[0]['distance']})", flush=True)
    return {"steps": plan.steps, "rows": rows}


def _row(plan: Plan, lever: str, change: str) -> LeverRow:
    every = [f"train.steps={plan.steps}", f"train.checkpoint_every={plan.steps}", f"train.sample_every={plan.steps}"]
    runs = []
    for seed in range(plan.seeds):
        params = parameters(PRESET, None, *plan.overrides, *every, f"train.seed={seed}", *change.split())
        inputs = prepare(plan.work, params, judge=True)
        runs.append(curve("ours", params, inputs, Scale(inputs, params, plan.measure), plan.work, 1)["curve"][-1])
    distances = [run["distance"] for run in runs]
    return {
        "lever": lever,
        "change": change or "as it is",
        "distance": float(f"{mean(distances):.4g}"),
        "spread": float(f"{stdev(distances):.2g}") if len(distances) > 1 else None,
        "seconds": round(mean(run["seconds"] for run in runs), 1),
        "cpu_seconds": round(mean(run["cpu_seconds"] for run in runs), 1),
    }
