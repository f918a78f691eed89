"""`reports/train/run.json`: what identifies a training run, for the stages that report and register it."""

from __future__ import annotations

from typing import ClassVar

from pydantic import JsonValue

from tasks.runtime.stage_file import Part, StageFile

FILE = "run.json"
Scalar = bool | int | float | str | None


class Dataset(Part):
    """The data set as MLflow records it."""

    name: str
    digest: str
    """Hash of the encoded data."""


class TrainingRecord(StageFile):
    """The content of `run.json`."""

    FORMAT: ClassVar[int] = 1
    STAGE: ClassVar[str] = "train"

    train_key: str
    """Names the weights."""
    trajectory_key: str
    """Names the checkpoints on the way to them."""
    trajectory: dict[str, JsonValue]
    """Everything that `trajectory_key` covers."""
    params: dict[str, Scalar]
    """Parameters of the sections model, diffusion and train as `section.name`; lists are JSON texts."""
    data: dict[str, str]
    """Hashes of the inputs."""
    dataset: Dataset
    averages: dict[str, float]
    """Held-out loss of each weight average after the last step."""
