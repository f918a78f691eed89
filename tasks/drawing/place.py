"""Where the command finds a model: a folder in diffusers' layout, or a version in the MLflow registry.

A registered model is downloaded once into the scratch folder, also from a server on another machine. Files are compared
with the checksums recorded in `afterimage.json` before they are loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.pipeline import INFO, Pipeline, load_pipeline
from tasks.drawing.published import is_published_text_to_image, open_published
from tasks.formats import model_folder
from tasks.params.redaction import redacted
from tasks.runtime import atomic, integrity, locks, tracking, workspace
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

REGISTERED = "models:/"
DEFAULT = "outputs/pipeline"
LOGGED_MODEL = "afterimage.logged_model"
"""Tag of a model version with the id of its logged model, see `tasks/register.py`."""
ARTIFACTS = f"artifacts/model/{model_folder.PIPELINE}"
MEASURED = f"artifacts/model/{model_folder.MEASUREMENTS}"


@dataclass(frozen=True)
class Place:
    """A model on this machine."""

    name: str
    """How the user named it; for an alias, the version that it stood for."""
    folder: Path
    """The pipeline, in diffusers' layout."""
    measurements: Path | None
    """`measurements.json` of its evaluation, if there is one."""
    remedy: str
    """What to do about a damaged file, as the end of an error message."""


def find(name: str) -> Place:
    """Find a model by a folder, or by `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        StageError: if there is none.
    """
    if name.startswith(REGISTERED):
        return _registered(name)
    folder = Path(name)
    if not folder.is_dir():
        missing = "run 'make repro', or name another" if name == DEFAULT else "name a folder in diffusers' layout"
        raise StageError(f"--model {name} is no folder; {missing}, or models:/NAME@champion")
    measured = Path("reports/evaluation") / model_folder.MEASUREMENTS if name == DEFAULT else None
    own = name == DEFAULT
    return Place(name, folder, measured, integrity.remedy("train") if own else "copy or fetch the folder again")


def open_pipeline(place: Place, device: str) -> Pipeline:
    """Load the pipeline, after comparing its files with their checksums if they are recorded.

    Raises:
        StageError: if a file is damaged, or if the model is of a kind that is not supported.
    """
    if (place.folder / INFO).exists():
        description = integrity.read_json(place.folder / INFO, "train")
        integrity.require(place.folder, description.get("files", {}), "train", place.remedy)
    try:
        if is_published_text_to_image(place.folder):
            return open_published(place.folder, device)
        return load_pipeline(place.folder, device)
    except FileNotFoundError as error:
        raise StageError(f"--model {place.name} holds no {Path(str(error.filename)).name}; {place.remedy}") from None
    except (ValueError, OSError) as error:
        raise StageError(f"--model {place.name}: {error}") from None


def _registered(name: str) -> Place:
    found = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", name)
    if not found:
        raise StageError(f"--model {name} is no registered model; write models:/NAME@ALIAS or models:/NAME/VERSION")
    client = tracking.connect()
    version, model_id = _version(client, *found.groups())
    folder = workspace.scratch() / "models" / model_id
    with locks.exclusive(workspace.scratch() / "locks" / "models.lock"):
        if not folder.is_dir():
            _download(client, name, model_id, folder)
    remedy = f"remove {folder} and draw again, which downloads it anew"
    measured = folder / model_folder.MEASUREMENTS
    return Place(version, folder / model_folder.PIPELINE, measured if measured.is_file() else None, remedy)


def _version(client: MlflowClient, name: str, alias: str | None, number: str | None) -> tuple[str, str]:
    """Return `models:/NAME/VERSION` and the id of the logged model."""
    from mlflow.exceptions import MlflowException

    try:
        version = (
            client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, str(number))
        )
    except MlflowException as error:
        reason = redacted(str(error).splitlines()[0])
        raise StageError(
            f"MLflow at {redacted(workspace.tracking_uri())} has no such model: {reason}; 'make ui' lists the models"
        ) from None
    model_id = version.tags.get(LOGGED_MODEL)
    if model_id is None or not re.fullmatch(r"[\w-]+", model_id):
        raise StageError(f"models:/{name}/{version.version} was not registered by this project; name another model")
    return f"{REGISTERED}{name}/{version.version}", model_id


def _download(client: MlflowClient, name: str, model_id: str, folder: Path) -> None:
    import mlflow
    from mlflow.exceptions import MlflowException

    print(f"draw: downloading {name} (once)", flush=True)
    try:
        location = client.get_logged_model(model_id).artifact_location
        with atomic.writing_folder(folder) as temporary:
            for part in (ARTIFACTS, MEASURED):
                found = mlflow.artifacts.download_artifacts(f"{location}/{part}", dst_path=str(temporary))
                Path(found).rename(temporary / Path(part).name)
    except (MlflowException, OSError) as error:
        reason = redacted(str(error).splitlines()[0])
        raise StageError(f"{name} cannot be downloaded ({reason}); check the MLflow server and try again") from None
