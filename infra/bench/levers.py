"""Ablations of a recipe: one choice changed at a time, with the same steps or time and measure, mean of seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from infra.bench.inputs import parameters, prepare
from infra.bench.quality import ENDLESS, Measure, Scale, curve, steps_in
from tasks.runtime import atomic

if TYPE_CHECKING:
    from infra.bench.schema import Curve, LeverRow, Levers
    from tasks.params import Params

PRESET = "digits"
DIFFUSION = "objective=diffusion"
DENSE = f"{DIFFUSION} diffusion.timestep_density=logit_normal"
ADAMW = "train.optimizer=adamw"
MIN_SNR = "diffusion.loss_weighting=min_snr diffusion.min_snr_gamma=2.0"
DIT = "model.architecture=dit model.dit.width=64 model.dit.depth=6 model.dit.heads=4 train.learning_rate=0.001"
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
    ("weighting", f"{DIFFUSION} {MIN_SNR}"),
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
    ("EMA", "train.ema=[decay-0.9] train.pipeline_ema=decay-0.9 train.ema_snapshots=0"),
    ("EMA", "train.ema=[decay-0.999] train.pipeline_ema=decay-0.999 train.ema_snapshots=0"),
    ("EMA", "train.ema=[std-0.15] train.pipeline_ema=std-0.15"),
    ("steps", "train.steps=300"),
    ("batch", "train.batch_size=32"),
    ("condition", "conditioning=none"),
    ("network", "model.block_out_channels=[32,32,64]"),
    ("network", "model.block_out_channels=[32,64,64]"),
    ("network", "model.attention=[false,true,true]"),
    ("network", "model.patch_size=2 model.block_out_channels=[48,64] model.attention=[false,false]"),
    ("network", "model.layers_per_block=2"),
    ("network", f"{DIT}"),
    ("network", f"{DIFFUSION} {DIT}"),
    ("network", f"{DIFFUSION} {DIT} {ADAMW}"),
)


BEFORE = f"{DIFFUSION} diffusion.loss_weighting=min_snr"
ON_CIFAR = (
    ("path", DENSE),
    ("timesteps", BEFORE),
    ("optimizer", f"{BEFORE} {ADAMW} train.learning_rate=0.001 train.warmup_steps=100"),
)
"""Back from the preset's recipe, a rectified flow with Muon, to the one that it had before, one choice after the other:
v-prediction, min-SNR weights with uniform timesteps, AdamW."""


@dataclass(frozen=True)
class Plan:
    """Each change trains for `steps` steps, or for as many as fit into `minutes`.

    `only` replaces the list of changes; an entry may have several overrides, separated by spaces.
    """

    work: Path
    pictures: Path
    """Folder for a grid of samples of each row."""
    preset: str
    archive: Path | None
    steps: int
    minutes: float | None
    seeds: int
    measure: Measure
    only: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of this part of the benchmark."""
        return "levers" if self.preset == PRESET else "levers_cifar"

    @property
    def changes(self) -> Sequence[tuple[str, str]]:
        """What is changed, and how."""
        return [("given", text) for text in self.only] or (LEVERS if self.preset == PRESET else ON_CIFAR)


def measure(plan: Plan) -> Levers:
    """Train the recipe and each of its changes."""
    rows: list[LeverRow] = []
    for lever, change in [("the recipe", ""), *plan.changes]:
        rows.append(_row(plan, lever, change, len(rows)))
        shown = f"{change or lever}: distance {rows[-1]['distance']}"
        print(f"levers: {shown} (recipe {rows[0]['distance']})", flush=True)
    return {"rows": rows}


def _row(plan: Plan, lever: str, change: str, number: int) -> LeverRow:
    runs = [_run(plan, change, seed) for seed in range(plan.seeds)]
    last = [run["curve"][-1] for run in runs]
    distances = [point["distance"] for point in last]
    picture = None
    if "picture" in runs[0]:
        picture = plan.pictures / f"{plan.name}-{number}.png"
        atomic.write_bytes(picture, (plan.work / "runs" / runs[0]["picture"]).read_bytes())
    return {
        "lever": lever,
        "change": change or "as it is",
        "steps": runs[0]["steps"],
        "distance": float(f"{mean(distances):.4g}"),
        "spread": float(f"{stdev(distances):.2g}") if len(distances) > 1 else None,
        "seconds": round(mean(point["seconds"] for point in last), 1),
        "cpu_seconds": round(mean(point["cpu_seconds"] for point in last), 1),
        "picture": picture.name if picture else None,
    }


def _run(plan: Plan, change: str, seed: int) -> Curve:
    def params(*more: str) -> Params:
        return parameters(plan.preset, plan.archive, *plan.overrides, *more, f"train.seed={seed}", *change.split())

    inputs = prepare(plan.work, params(ENDLESS), judge=True)
    steps = plan.steps
    if plan.minutes is not None:
        steps = steps_in(60 * plan.minutes, "ours", params(ENDLESS), inputs, plan.work)
    chosen = params(*(f"train.{name}={steps}" for name in ("steps", "checkpoint_every", "sample_every")))
    return curve("ours", chosen, inputs, Scale(inputs, chosen, plan.measure), plan.work, 1)
