"""Measure a registered version again: its weights come from MLflow, its numbers are remembered as tags."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow

from models.device import best_device
from models.judges.judge import load_judge
from models.pipeline import load_pipeline
from tasks.evaluation.summary import measure
from tasks.formats import model_folder
from tasks.registration import gates
from tasks.runtime import integrity

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

    from models.pipeline import Pipeline
    from tasks.evaluation.protocol import Protocol
    from tasks.registration.gates import Judged

TAG = "afterimage."
LOGGED_MODEL = f"{TAG}logged_model"
MEASURED, MEASURED_GUIDED = f"{TAG}measured", f"{TAG}measured_guided"


def numbers(
    client: MlflowClient, version: ModelVersion, judge: Path, images: Path, declared: Protocol, *, guided: bool = False
) -> Judged:
    """Return the numbers of a version under a protocol, from its tags or by drawing from its weights.

    Args:
        client: A client of MLflow.
        version: The version, whose tags get the numbers.
        judge: Folder of what measures.
        images: Folder of the data set.
        declared: The protocol.
        guided: Whether to draw guided samples as well. The comparison of two versions needs none, and a champion need
            not have the challenger's kind of guidance.

    Raises:
        NotComparableError: if the version's pipeline does not fit the protocol.
    """
    digest = hashlib.sha256(json.dumps(declared.to_json(), sort_keys=True).encode()).hexdigest()
    remembered = f"{MEASURED_GUIDED if guided else MEASURED}.{digest[:16]}"
    if remembered in version.tags:
        known = gates.from_tags(json.loads(version.tags[remembered]), declared.headline)
        if known:
            return known
    print(f"measuring version {version.version} of {version.name} under this protocol", flush=True)
    with pipeline_of(version) as pipeline, integrity.loading(judge, "judge.json", "judge"):
        protocol = declared if guided else replace(declared, guided=None)
        found = gates.judged(measure(pipeline, images, load_judge(judge, pipeline.device), protocol))
    written = json.dumps(found.tags(), sort_keys=True)
    client.set_model_version_tag(version.name, version.version, remembered, written)
    return found


@contextmanager
def pipeline_of(version: ModelVersion) -> Iterator[Pipeline]:
    """Yield the pipeline of a version on the device of `evaluate`; its files exist until the end of the block."""
    with tempfile.TemporaryDirectory() as scratch:
        logged = f"models:/{version.tags[LOGGED_MODEL]}"
        folder = Path(mlflow.artifacts.download_artifacts(logged, dst_path=scratch))
        yield load_pipeline(folder / "artifacts" / "model" / model_folder.PIPELINE, best_device())
