"""Sweeps in an MLflow store: a parent run, and a child for each evaluation, logged as the flow logs them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.images import pictures
from tasks.sweeps import leaderboard, plan, records
from tasks.sweeps.spec import Spec
from tests.support import model_outputs

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

    from tasks.sweeps.leaderboard import Board

RATES = (0.001, 0.002, 0.004)


def rates(seeds: int = 3) -> Spec:
    """A sweep of three learning rates."""
    return Spec(
        title="Rates",
        question="Which learning rate is best?",
        preset="digits",
        grid={"train.learning_rate": list(RATES)},
        seeds=list(range(seeds)),
        metrics=["frechet_distance_unguided", "label_accuracy_guided"],
    )


def distance(trial: plan.Evaluation) -> float:
    """Rates 0.001 and 0.002 are nearly as good; 0.004 is far worse."""
    rate = trial.trained["train.learning_rate"]
    return {0.001: 1.0, 0.002: 1.05, 0.004: 9.0}[rate] + 0.1 * trial.seed  # type: ignore[index]


def log(
    client: MlflowClient, parent: Run, evaluation: plan.Evaluation, folder: Path, key: str, **changes: object
) -> str:
    """Log a finished evaluation; returns its run."""
    run = records.begin(client, parent, evaluation, key)
    model_outputs.write_reports(folder, distance=distance(evaluation), **changes)
    tiles = np.stack([np.full((1, 8, 8), shade, np.uint8) for shade in (10, 90, 170)])
    pictures.save_png(
        pictures.grid(tiles, 3, column_titles=model_outputs.CLASSES), folder / "reports/evaluation/grid_unguided.png"
    )
    for name in ("params.yaml", "dvc.lock"):
        (folder / name).touch()
    records.finish(client, run, folder, f"rates-{evaluation.slug}", 2.0)
    return run


def sweep(client: MlflowClient, folder: Path, name: str = "rates") -> tuple[Run, Board]:
    """Log a complete sweep with its leaderboard."""
    spec = rates()
    parent = records.parent(client, name, name, spec, [])
    evaluations = [evaluation for trial in plan.trials(spec) for evaluation in trial.evaluations]
    runs = [log(client, parent, each, folder, f"{number:064}") for number, each in enumerate(evaluations)]
    cases = list(dict.fromkeys(each.case for each in evaluations))
    board = leaderboard.board([records.result(client, run) for run in runs], spec.metrics, cases, [])
    records.publish(client, parent, board.to_json(), leaderboard.markdown(board), complete=True)
    return parent, board
