"""What is compared: one evaluated model with its parameters, curves, numbers and samples, wherever it is stored."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from models.json_files import read_json
from tasks.runtime import measures, run_labels
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from models.json_files import JsonObject
    from tasks.runtime.measures import Measurements

PROTOCOL = "protocol.json"
GRIDS = {"unguided": "grid_unguided.png", "guided": "grid_guided.png"}
"""Samples from the seeds of the protocol, in `reports/evaluation`."""
OPAQUE_SHARE = 0.5
"""A row or column of pixels belongs to the images of a grid if at least this share of it is opaque."""
Curve = Sequence[tuple[int, float]]
"""(step, value) in increasing order."""


@dataclass(frozen=True)
class Subject:
    """One evaluated model."""

    name: str
    params: Mapping[str, str]
    """Dotted name -> value as text."""
    curves: Mapping[str, Curve]
    """Name in MLflow, such as "train/loss" -> values over the steps."""
    measured: Measurements
    protocol: JsonObject
    """Content of `protocol.json`."""
    samples: Mapping[str, np.ndarray]
    """"unguided" or "guided" -> the first row of the grid, uint8 [K, 3, H, W]: seeds `seed`, `seed` + 1, ..."""
    origin: str
    """Where it was read from, such as "MLflow run 1a2b"."""

    @property
    def seed(self) -> int:
        """First seed of the samples."""
        return int(self.protocol["measurement"]["seed"])

    @property
    def labels(self) -> list[str] | None:
        """Names of the classes in the order in which samples are requested; None for an unconditional model."""
        labels: list[str] | None = self.protocol["measurement"]["labels"]
        return labels


def from_evaluation(
    folder: Path, name: str, params: Mapping[str, str], curves: Mapping[str, Curve], origin: str
) -> Subject:
    """Read a subject from a folder with the files of `reports/evaluation`.

    Raises:
        StageError: if a file is missing or was written by another version.
    """
    measured = measures.read(folder / measures.FILE)
    if not (folder / PROTOCOL).is_file():
        raise StageError(f"{origin} has no {PROTOCOL}; run 'dvc repro evaluate' there, or name another run")
    grids = {drawn: folder / file for drawn, file in GRIDS.items() if (folder / file).is_file()}
    samples = {drawn: first_row(path) for drawn, path in grids.items()}
    return Subject(name, params, curves, measured, read_json(folder / PROTOCOL), samples, origin)


def first_row(path: Path) -> np.ndarray:
    """Return the images in the first row of a grid, uint8 [K, 3, H, W].

    `models.images.pictures.grid` separates images by transparent pixels, and titles are drawn on transparent ground.
    """
    with Image.open(path, formats=["PNG"]) as image:
        pixels = np.asarray(image.convert("RGBA"))
    opaque = pixels[..., 3] == 255
    rows = _runs(opaque.mean(axis=1) >= OPAQUE_SHARE)
    if not rows:
        raise StageError(f"{path} holds no images; run 'dvc repro evaluate'")
    top, bottom = rows[0]
    columns = _runs(opaque[top:bottom].mean(axis=0) >= OPAQUE_SHARE)
    return np.stack([pixels[top:bottom, left:right, :3].transpose(2, 0, 1) for left, right in columns])


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Half-open ranges [first, after) in which a boolean vector is true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [(int(first), int(after)) for first, after in edges.reshape(-1, 2)]


def read_history(text: str) -> dict[str, list[tuple[int, float]]]:
    """Return the curves of `reports/train/history.csv` under their names in MLflow."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in csv.DictReader(text.splitlines()):
        step = int(row.pop("step"))
        values = {name: float(value) for name, value in row.items() if value}
        for name, value in run_labels.training_metrics(values).items():
            curves.setdefault(name, []).append((step, value))
    return curves
