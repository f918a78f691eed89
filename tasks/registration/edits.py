"""The results of stage `edit` in MLflow: metrics, tables and pictures of the evaluation run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from models.hashing import folder_sha256
from tasks.runtime import integrity, tracking

if TYPE_CHECKING:
    from pathlib import Path

    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

KEY = "afterimage.edits_sha256"
FOLDER = "editing"
"""Folder of the run's artifacts."""


def log(client: MlflowClient, run: Run, edits: Path, editing: Path) -> None:
    """Log the numbers of `edits` and the files of `editing`, unless the run has exactly these already."""
    digest = folder_sha256(editing)
    pictures = sorted(editing.glob("*.png"))
    if not pictures or run.data.tags.get(KEY) == digest:
        return
    run_id = run.info.run_id
    client.log_batch(run_id, metrics=tracking.points(0, dict(metrics(integrity.read_json(edits, "edit")))))
    client.log_artifacts(run_id, str(editing), FOLDER)
    for picture in pictures:
        tracking.log_image(client, run_id, f"edit_{picture.stem}", 0, picture)
    client.set_tag(run_id, KEY, digest)


def metrics(values: Mapping[str, object], prefix: str = "edit/") -> Iterator[tuple[str, float]]:
    """Yield every number of nested results under its name in MLflow, such as `edit/inpainting_half_known_error`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from metrics(value, f"{prefix}{name}_")
        elif isinstance(value, int | float):
            yield prefix + name, float(value)
