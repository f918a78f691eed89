"""Finding a subject by what a user types: an MLflow run, a registered version, a DVC experiment or a Git revision."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from ruamel.yaml import YAML

from models.json_files import read_json
from tasks.comparison.subject import Curve, Subject, from_evaluation, read_history
from tasks.params import composition
from tasks.runtime import tracking
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

RUN = re.compile(r"[0-9a-f]{32}")
VERSION = re.compile(r"(?:models:/)?([^/@]+)(?:/(\d+)|@([\w-]+))")
"""NAME/3, NAME@champion, and both after models:/."""
EVALUATION, TRAINING = "reports/evaluation", "reports/train"
IRRELEVANT = ("visualize.", "export.", "register.", "edit.", "preset")
"""Parameters that affect neither weights nor numbers."""


def find(reference: str) -> Subject:
    """Return the subject that `reference` names.

    Raises:
        StageError: if there is none, or if it was not evaluated.
    """
    if RUN.fullmatch(reference):
        return _of_run(tracking.connect(), reference)
    if found := VERSION.fullmatch(reference):
        client = tracking.connect()
        run = _run_of_version(client, *found.groups())
        if run is not None:
            return _of_run(client, run)
        if reference.startswith("models:/"):
            raise StageError(f"MLflow has no version {reference}; 'make ui' shows the registered models")
    revision = _revision(reference)
    if revision is None:
        raise StageError(
            f"'{reference}' is neither an MLflow run, nor a registered version such as NAME/3, nor a DVC experiment or "
            "Git revision; 'dvc exp show' and 'make ui' list them"
        )
    return _of_revision(reference, revision)


def _run_of_version(client: MlflowClient, name: str, number: str | None, alias: str | None) -> str | None:
    """Id of the training run of a registered version; None if there is no such version."""
    from mlflow.exceptions import MlflowException

    try:
        version = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    except MlflowException:
        return None
    return str(version.run_id)


def _of_run(client: MlflowClient, run_id: str) -> Subject:
    from mlflow.exceptions import MlflowException
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    try:
        run = client.get_run(run_id)
    except MlflowException:
        raise StageError(f"MLflow has no run {run_id}; 'make ui' lists the runs") from None
    kind, training, evaluation = run.data.tags.get(tracking.KIND), run, run
    if kind == "training":
        evaluation = _evaluation_of(client, run)
    elif kind == "evaluation":
        training = client.get_run(run.data.tags[MLFLOW_PARENT_RUN_ID])
    names = {file.path for file in client.list_artifacts(evaluation.info.run_id)}
    if "evaluation" not in names:
        raise StageError(f"run {run_id} ({run.info.run_name}) has no evaluation; name a run that ended with one")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(client.download_artifacts(evaluation.info.run_id, "evaluation", scratch))
        params = _without_irrelevant({**_protocol_params(folder), **training.data.params})
        curves = _curves(client, training)
        return from_evaluation(folder, str(run.info.run_name), params, curves, f"MLflow run {run_id}")


def _evaluation_of(client: MlflowClient, run: Run) -> Run:
    """The newest finished evaluation of a training run."""
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    filters = (
        f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run.info.run_id}' and tags.`{tracking.KIND}` = 'evaluation' "
        "and attributes.status = 'FINISHED'"
    )
    experiments = [tracking.experiment_id(client)]
    found = client.search_runs(experiments, filters, order_by=["start_time DESC"], max_results=1)
    if not found:
        raise StageError(
            f"training run {run.info.run_id} has no evaluation; run 'dvc repro' there, or name another run"
        )
    return found[0]


def _curves(client: MlflowClient, run: Run) -> dict[str, Curve]:
    found: dict[str, Curve] = {}
    for name in run.data.metrics:
        if name.startswith("train/"):
            history = client.get_metric_history(run.info.run_id, name)
            found[name] = sorted({point.step: point.value for point in history}.items())
    return found


def _protocol_params(folder: Path) -> dict[str, str]:
    """The settings of an evaluation under the names of `params.yaml`."""
    protocol = read_json(folder / "protocol.json") if (folder / "protocol.json").is_file() else {}
    names = ("sampler", "steps", "eta", "guidance_interval", "guidance", "headline")
    values = {f"evaluate.{name}": protocol[name] for name in names if name in protocol}
    if "guidance_scales" in protocol:
        values["evaluate.guidance_scale"] = protocol["guidance_scales"]["guided"]
    return {name: _text(value) for name, value in values.items()}


def _without_irrelevant(params: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in sorted(params.items()) if not name.startswith(IRRELEVANT)}


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.rstrip("\n") if done.returncode == 0 else None


def _revision(reference: str) -> str | None:
    """Commit of a DVC experiment or of a Git revision; None if there is none."""
    if not reference.startswith("-") and (
        commit := _git("rev-parse", "--verify", "--quiet", f"{reference}^{{commit}}")
    ):
        return commit
    listed = _git("for-each-ref", "--sort=-committerdate", "--format=%(objectname) %(refname)", "refs/exps") or ""
    lines = (line.partition(" ") for line in listed.splitlines())
    return next((commit for commit, _, name in lines if name.rpartition("/")[2] == reference), None)


def _of_revision(name: str, commit: str) -> Subject:
    """Read a subject from `dvc.lock` and `params.yaml` of a commit, and from the DVC cache."""
    lock, params = _git("show", f"{commit}:./dvc.lock"), _git("show", f"{commit}:./params.yaml")
    if lock is None or params is None:
        raise StageError(f"{name} has no dvc.lock and params.yaml; name a commit of a finished run")
    stages = yaml.safe_load(lock).get("stages", {})
    outs = {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}
    cache = _cache()
    document = YAML(typ="safe", pure=True).load(params)
    flat = {key: _text(value) for key, value in composition.flatten(document)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for path in (EVALUATION, TRAINING):
            if path not in outs:
                raise StageError(
                    f"dvc.lock of {name} has no {path}; name a commit in which 'dvc repro evaluate' has run"
                )
            _fetch(cache, outs[path], folder / path, name)
        history = (folder / TRAINING / "history.csv").read_text(encoding="utf-8")
        curves: dict[str, Curve] = {**read_history(history)}
        return from_evaluation(
            folder / EVALUATION, name, _without_irrelevant(flat), curves, f"commit {commit[:12]} and the DVC cache"
        )


def _cache() -> Path:
    command = [sys.executable, "-m", "dvc", "cache", "dir"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageError(f"DVC does not work here: {' '.join(done.stderr.split())}")
    return Path(done.stdout.strip()) / "files" / "md5"


def _fetch(cache: Path, md5: str, destination: Path, name: str) -> None:
    """Link the files of a folder in the DVC cache, which lists them in a JSON file named by its checksum."""
    listing = cache / md5[:2] / md5[2:]
    if not listing.is_file():
        raise StageError(f"the DVC cache lacks files of {name}; fetch them with 'dvc fetch --all-commits'")
    for entry in json.loads(listing.read_text(encoding="utf-8")):
        source = cache / entry["md5"][:2] / entry["md5"][2:]
        target = destination / entry["relpath"]
        if not source.is_file():
            raise StageError(f"the DVC cache lacks {target.name} of {name}; fetch it with 'dvc fetch --all-commits'")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source.resolve())
