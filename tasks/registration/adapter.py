"""LoRA adapters in the MLflow registry, in MLflow's flavour `diffusers`.

A model trained with LoRA is registered twice: with merged weights, as a model that needs nothing else, and here as the
adapter alone with the name of its base, for `mlflow.diffusers.load_model(...).load_pipeline()`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow.diffusers
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

from tasks.runtime import tracking

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

WEIGHTS = Path("lora") / "pytorch_lora_weights.safetensors"
"""Below the pipeline's folder."""
SUFFIX = "-lora"
KEY = "afterimage.adapter_key"
REQUIREMENTS = ("accelerate", "diffusers", "peft", "safetensors", "torch", "transformers")


@dataclass(frozen=True)
class Base:
    """The base pipeline of an adapter."""

    model: str
    """A repository of the Hugging Face Hub, or `./` and the name of a local folder."""
    revision: str | None = None
    """Commit of the repository."""


def base_of(params: Mapping[str, str]) -> Base | None:
    """Return the base of a training run with these parameters (strings, as MLflow stores them).

    Returns None if the run trained its own base, which is not kept. For a local folder only the name is known; users
    pass its path to `load_pipeline(base_model=...)`.
    """
    if params.get("train.full_steps", "0") != "0":
        return None
    weights = params.get("train.weights", "None")
    if weights == "None":
        return Base(f"./{params['train.init_from']}")
    if "/" in weights and "://" not in weights:
        return Base(weights, params["train.pin"])
    return Base(f"./{weights.rstrip('/').rsplit('/', 1)[-1]}")


def register(client: MlflowClient, name: str, pipeline: Path, trained: Run) -> str | None:
    """Find or create the version of `name`-lora with the adapter of `pipeline`.

    Returns a clause about the result, or None without an adapter.
    """
    weights = pipeline / WEIGHTS
    if not weights.is_file():
        return None
    base = base_of(trained.data.params)
    if base is None:
        return "no adapter is registered: its base was trained by train.full_steps and is not kept"
    name += SUFFIX
    key = hashlib.sha256(repr(base).encode() + weights.read_bytes()).hexdigest()
    found = client.search_model_versions(f"name = '{name}' and tags.`{KEY}` = '{key}'")
    if found:
        return f"adapter {name} version {min(int(version.version) for version in found)}"
    try:
        client.create_registered_model(name, description="LoRA adapter of the pipeline Afterimage (mlflow.diffusers).")
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
    experiment, tags = tracking.experiment_id(client), {KEY: key}
    left = client.search_logged_models([experiment], f"tags.`{KEY}` = '{key}'", max_results=1)
    logged = (
        left[0]
        if left
        else client.create_logged_model(experiment, name=name, source_run_id=trained.info.run_id, tags=tags)
    )
    _log(client, logged.model_id, weights, base)
    version = client.create_model_version(
        name,
        source=logged.artifact_location,
        run_id=trained.info.run_id,
        tags=tags | {tracking.TRAIN_KEY: trained.data.tags[tracking.TRAIN_KEY]},
        description=f"For {base.model}{f' at {base.revision}' if base.revision else ''}.",
        model_id=logged.model_id,
    )
    return f"adapter {name} version {version.version}"


def _log(client: MlflowClient, model_id: str, weights: Path, base: Base) -> None:
    """Log the adapter as the logged model `model_id`, with the commit of its base: MLflow would record the newest."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, model = Path(scratch) / "model", Model(model_id=model_id)
        requirements = [f"{package}=={_release(package)}" for package in REQUIREMENTS]
        mlflow.diffusers.save_model(
            str(weights), str(folder), base.model, mlflow_model=model, pip_requirements=requirements
        )
        model.flavors[mlflow.diffusers.FLAVOR_NAME].pop("base_model_revision", None)
        if base.revision:
            model.flavors[mlflow.diffusers.FLAVOR_NAME]["base_model_revision"] = base.revision
        model.save(str(folder / MLMODEL_FILE_NAME))
        client.log_model_artifacts(model_id, str(folder))
    client.finalize_logged_model(model_id, "READY")


def _release(package: str) -> str:
    return importlib.metadata.version(package).split("+")[0]
