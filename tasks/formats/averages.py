"""`averages.json`: the snapshots of power-law averages that `train` keeps for `tasks.reconstruct`."""

from __future__ import annotations

from typing import ClassVar

from tasks.runtime.stage_file import Part, StageFile

FILE = "averages.json"
REFERENCE = "reference.safetensors"
"""An average after the last step: parameter name -> float32 tensor."""


class Snapshot(Part):
    """One average after one step, as safetensors: parameter name -> difference from the reference, float16."""

    file: str
    step: int
    profile: str
    """Name of the average, such as "std-0.10"."""


class Averages(StageFile):
    """The content of `averages.json`."""

    FORMAT: ClassVar[int] = 1
    STAGE: ClassVar[str] = "train"

    train_key: str
    """Identity of the training run, as in the pipeline."""
    steps: int
    """Length of the run."""
    snapshots: list[Snapshot]
    """By step and profile; empty if the run kept none."""
    files: dict[str, str]
    """File name -> SHA-256."""
