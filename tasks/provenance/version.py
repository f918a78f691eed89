"""A version of a registered model in MLflow: how a user names it, and the records that were stored with it.

Import this module after `tracking.connect()`, which sets MLflow's environment.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
from mlflow.exceptions import MlflowException

from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

    from models.json_files import JsonObject

URI = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<number>\d+))")
TAG = "afterimage."
CONTENT_KEY, LOGGED_MODEL = f"{TAG}content_key", f"{TAG}logged_model"


def find(client: MlflowClient, uri: str) -> ModelVersion:
    """Return the version that `models:/NAME@ALIAS` or `models:/NAME/NUMBER` names.

    Raises:
        StageError: if `uri` has another form, or MLflow has no such version.
    """
    match = URI.fullmatch(uri)
    if match is None:
        raise StageError(f"'{uri}' names no model version; write models:/NAME@champion or models:/NAME/NUMBER")
    try:
        if match["alias"]:
            return client.get_model_version_by_alias(match["name"], match["alias"])
        return client.get_model_version(match["name"], match["number"])
    except MlflowException as error:
        raise StageError(f"MLflow has no {uri} ({str(error).splitlines()[0]}); 'make ui' lists the models") from None


@dataclass(frozen=True)
class Record:
    """What `register` stored of the work tree beside the training run."""

    facts: JsonObject
    """See `lineage.lineage`."""
    files: dict[str, str]
    """Name -> text of `dvc.lock` and `params.yaml`; versions of earlier releases have none."""


def read_record(client: MlflowClient, version: ModelVersion) -> Record:
    """Read the record of a version from the artifacts of its run. Raises `StageError` if it is missing."""
    name = f"lineage/{version.tags[CONTENT_KEY][:12]}"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            kept = Path(client.download_artifacts(version.run_id, f"{name}.json", scratch))
            facts = json.loads(kept.read_text(encoding="utf-8"))
        except (MlflowException, OSError, ValueError) as error:
            raise StageError(f"run {version.run_id} has no artifact {name}.json ({_line(error)})") from None
        files = {}
        for listed in client.list_artifacts(version.run_id, name):
            file = Path(client.download_artifacts(version.run_id, listed.path, scratch))
            files[file.name] = file.read_text(encoding="utf-8")
    return Record(facts, files)


def download(version: ModelVersion, folder: Path) -> Path:
    """Download the files of a version, the content of `outputs/model`, to `folder`, and return that.

    Raises:
        StageError: if MLflow lacks them.
    """
    logged = version.tags[LOGGED_MODEL]
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        try:
            arrived = Path(mlflow.artifacts.download_artifacts(f"models:/{logged}", dst_path=scratch))
            (arrived / "artifacts" / "model").rename(folder)
        except (MlflowException, OSError) as error:
            raise StageError(f"logged model {logged} cannot be downloaded ({_line(error)})") from None
    return folder


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def stages(record: Record) -> JsonObject:
    """Return the stages of the recorded `dvc.lock`. Raises `StageError` if none was recorded."""
    found: JsonObject | None = record.facts["dvc"]["stages"]
    if not found:
        raise StageError("the version was registered without a dvc.lock, so that its files cannot be verified")
    return found
