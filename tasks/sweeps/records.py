"""The MLflow runs of a sweep: a parent run, and a child for each evaluation with its parameters, numbers and curves.

A child is found by the content key of its evaluation (`tasks/sweeps/identity.py`). A finished one is not computed
again, whichever commit or sweep file asks for it.
"""

from __future__ import annotations

import csv
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.json_files import read_json
from tasks.params import composition
from tasks.runtime import lineage, measures, run_labels, tracking

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.tracking import MlflowClient

    from models.json_files import JsonObject
    from tasks.sweeps.plan import Evaluation
    from tasks.sweeps.spec import Spec

SWEEP, TRIAL = "sweep", "trial"
"""Kinds of runs (tag `tracking.KIND`): the parent and a child."""
NAME, KEY = "afterimage.sweep", "afterimage.evaluation_content"
"""Tags: the sweep with its overrides, on both kinds, and the content key of a child."""
CASE, SEED, EXPERIMENT = "afterimage.case", "afterimage.seed", "afterimage.experiment"
REASON = "afterimage.reason"
"""Tag of a child that failed."""
TRAINED = "afterimage.trained"
"""Tag of a child: key of its training run (`tracking.TRAIN_KEY` of that run)."""
GUIDANCE = "guidance.csv"
ARTIFACTS = "evaluation"
"""Artifact folder, with the files of `reports/evaluation`; the same as in an evaluation run."""


@dataclass(frozen=True)
class Result:
    """A finished evaluation."""

    run_id: str
    case: str
    seed: int
    metrics: dict[str, float]
    """Under the names of `Measurements.flat`, and of guided samples also the distances."""
    fingerprint: str
    experiment: str
    """Name of the DVC experiment."""
    seconds: float


def parent(client: MlflowClient, identity: str, name: str, spec: Spec, overrides: Sequence[str]) -> Run:
    """Find or create the parent run of a sweep, and set it to RUNNING.

    Args:
        client: A client of MLflow.
        identity: The sweep with its overrides, value of the tag `NAME`.
        name: Name of the sweep.
        spec: The sweep file.
        overrides: Overrides of all trials.
    """
    filters = f"tags.`{NAME}` = '{identity}' and tags.`{tracking.KIND}` = '{SWEEP}'"
    found = client.search_runs([tracking.experiment_id(client)], filters, max_results=1)
    if found:
        run = found[0]
        client.update_run(run.info.run_id, status="RUNNING")
    else:
        tags = {tracking.KIND: SWEEP, NAME: identity, run_labels.PRESET: spec.preset}
        run = client.create_run(tracking.experiment_id(client), tags=tags, run_name=f"sweep {name}")
    run_id = run.info.run_id
    for tag, value in _provenance().items():
        client.set_tag(run_id, tag, value)
    client.log_dict(run_id, {**spec.model_dump(mode="json"), "command_line_overrides": list(overrides)}, "sweep.json")
    return run


def _provenance() -> dict[str, str]:
    from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

    commit = lineage.git_commit()
    values = {
        MLFLOW_GIT_COMMIT: commit,
        run_labels.GIT_COMMIT: commit[: run_labels.SHORT_COMMIT] if commit else None,
        "afterimage.prefect_flow_run": lineage.flow_run(),
    }
    return {tag: value for tag, value in values.items() if value}


def begin(client: MlflowClient, parent: Run, evaluation: Evaluation, key: str) -> str:
    """Find or create the child of an evaluation and set it to RUNNING; returns its id."""
    from mlflow.entities import Param
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    identity = parent.data.tags[NAME]
    run = _find(client, key, f"tags.`{NAME}` = '{identity}'")
    if run is None:
        tags = {
            tracking.KIND: TRIAL,
            NAME: identity,
            KEY: key,
            CASE: evaluation.case,
            SEED: str(evaluation.seed),
            MLFLOW_PARENT_RUN_ID: parent.info.run_id,
            run_labels.PRESET: evaluation.document["preset"],
        }
        run = client.create_run(tracking.experiment_id(client), tags=tags, run_name=evaluation.label)
        params = [Param(name, str(value)) for name, value in sorted(composition.flatten(evaluation.document))]
        for start in range(0, len(params), 100):
            client.log_batch(run.info.run_id, params=params[start : start + 100])
    client.update_run(run.info.run_id, status="RUNNING")
    for tag, value in _provenance().items():
        client.set_tag(run.info.run_id, tag, value)
    return str(run.info.run_id)


def fail(client: MlflowClient, run_id: str, reason: str) -> None:
    """Set a child to FAILED, with the reason as a tag."""
    client.set_tag(run_id, REASON, reason)
    client.set_terminated(run_id, "FAILED")


def finish(client: MlflowClient, run_id: str, folder: Path, experiment: str, seconds: float) -> None:
    """Log what `train` and `evaluate` wrote in the work tree `folder`, and set the child to FINISHED."""
    from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

    reports = folder / "reports"
    measured = measures.read(reports / "evaluation" / measures.FILE)
    tags = {EXPERIMENT: experiment, run_labels.DVC_EXPERIMENT: experiment}
    tags |= {TRAINED: read_json(reports / "train" / "run.json")["train_key"]}
    tags |= {MLFLOW_RUN_NOTE: run_labels.description(measured, None)}
    for tag, value in tags.items():
        client.set_tag(run_id, tag, value)
    if REASON in client.get_run(run_id).data.tags:
        client.delete_tag(run_id, REASON)
    values = {f"eval/{name}": value for name, value in numbers(reports / "evaluation").items()}
    points = tracking.points(0, {**values, "seconds": seconds}) + _curves(reports / "train" / "history.csv")
    for start in range(0, len(points), tracking.BATCH):
        client.log_batch(run_id, metrics=points[start : start + tracking.BATCH])
    client.log_param(run_id, "fingerprint", measured.fingerprint)
    client.log_artifacts(run_id, str(reports / "evaluation"), ARTIFACTS)
    for name in ("params.yaml", "dvc.lock"):
        client.log_artifact(run_id, str(folder / name))
    client.set_terminated(run_id, "FINISHED")


def _curves(history: Path) -> list[Metric]:
    found: list[Metric] = []
    with history.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            values = {name: float(value) for name, value in row.items() if value}
            found += tracking.points(step, run_labels.training_metrics(values))
    return found


def numbers(evaluation: Path) -> dict[str, float]:
    """Return all numbers of `reports/evaluation`.

    `evaluate` takes distances of unguided samples. Those of samples at the guidance scale are in the table of scales:
    one block of `evaluate.n_sweep` samples. They are added as `<measure>_guided`.
    """
    measured = measures.read(evaluation / measures.FILE)
    found = measured.flat()
    path = evaluation / GUIDANCE
    if measured.guided_scale is None or not path.exists():
        return found
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if float(row["guidance_scale"]) == measured.guided_scale]
    if len(rows) == 1:
        names = ("frechet_distance", "kid", "cmmd", "precision", "recall", "inception_score")
        found |= {f"{name}_guided": float(rows[0][name]) for name in names if rows[0].get(name)}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def finished(client: MlflowClient, key: str, identity: str) -> Result | None:
    """Return the finished evaluation with this content key in the sweep `identity`, or None."""
    run = _find(client, key, f"tags.`{NAME}` = '{identity}' and attributes.status = 'FINISHED'")
    return _result(run) if run else None


def _find(client: MlflowClient, key: str, condition: str) -> Run | None:
    filters = f"tags.`{KEY}` = '{key}' and tags.`{tracking.KIND}` = '{TRIAL}' and {condition}"
    found = client.search_runs([tracking.experiment_id(client)], filters, max_results=1)
    return found[0] if found else None


def _result(run: Run) -> Result:
    measured = {name: value for name, value in run.data.metrics.items() if name.startswith("eval/")}
    return Result(
        run_id=run.info.run_id,
        case=run.data.tags[CASE],
        seed=int(run.data.tags[SEED]),
        metrics={name.removeprefix("eval/"): value for name, value in measured.items()},
        fingerprint=run.data.params.get("fingerprint", ""),
        experiment=run.data.tags.get(EXPERIMENT, ""),
        seconds=run.data.metrics.get("seconds", 0.0),
    )


def result(client: MlflowClient, run_id: str) -> Result:
    """Read a finished child."""
    return _result(client.get_run(run_id))


def publish(client: MlflowClient, parent: Run, board: JsonObject, markdown: str, complete: bool) -> None:
    """Log the leaderboard with the parent and end it: FINISHED if every trial has a result, else FAILED."""
    run_id = parent.info.run_id
    client.log_dict(run_id, board, "leaderboard.json")
    client.log_text(run_id, markdown, "leaderboard.md")
    client.set_terminated(run_id, "FINISHED" if complete else "FAILED")


def leaderboard(client: MlflowClient, run_id: str) -> JsonObject:
    """Read `leaderboard.json` of a parent."""
    with tempfile.TemporaryDirectory() as scratch:
        path = client.download_artifacts(run_id, "leaderboard.json", scratch)
        board: JsonObject = json.loads(Path(path).read_text(encoding="utf-8"))
    return board
