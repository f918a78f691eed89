"""An MLflow store and a work tree in which everything before `register` has run."""

from __future__ import annotations

import io
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from tasks.params import RegisterParams
from tasks.register import register
from tasks.runtime import tracking
from tests.support import model_outputs

if TYPE_CHECKING:
    import pytest
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.pyfunc import PyFuncModel
    from mlflow.tracking import MlflowClient

ROOT = Path(__file__).parents[2]
NAME = "afterimage-test"
PARAMS = RegisterParams(model_name=NAME, max_distance_over_floor=3.0, min_label_accuracy=0.95)


@dataclass
class Workspace:
    """A work tree with an MLflow store of its own."""

    root: Path
    _client: MlflowClient | None = None

    @property
    def client(self) -> MlflowClient:
        """The client that the last registration used."""
        assert self._client is not None, "nothing was registered"
        return self._client

    def register(self, params: RegisterParams = PARAMS, **reports: Any) -> None:
        """Write the reports of a run, package its model and register it."""
        model_outputs.write_reports(self.root, **reports)
        model_outputs.run_package(self.root)
        self.again(params)

    def again(self, params: RegisterParams = PARAMS) -> None:
        """Register the files as they are."""
        register(*self.paths(), params)
        self._client = tracking.connect()

    def paths(self) -> list[Path]:
        outputs, reports = self.root / "outputs", self.root / "reports"
        inputs = [outputs / "model", outputs / "judge", self.root / "data" / "images", reports / "train"]
        evaluation = [reports / "evaluation", reports / "timing" / "evaluate.json"]
        after = [reports / name for name in ("export.json", "edits.json", "editing", "figures", "index.html")]
        return [*inputs, *evaluation, *after]

    @property
    def aliases(self) -> dict[str, int]:
        return {name: int(v) for name, v in self.client.get_registered_model(NAME).aliases.items()}

    @property
    def versions(self) -> dict[int, ModelVersion]:
        return {int(v.version): v for v in self.client.search_model_versions(f"name = '{NAME}'")}

    def promotion(self, version: int) -> str:
        return self.client.get_model_version(NAME, str(version)).tags["afterimage.promotion"]

    def runs(self, kind: str) -> list[Run]:
        found = self.client.search_runs([tracking.experiment_id(self.client)], order_by=["start_time"])
        return [run for run in found if run.data.tags[tracking.KIND] == kind]

    def history(self, run_id: str, name: str = "train/loss") -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in self.client.get_metric_history(run_id, name)]


def workspace_in(folder: Path, exported: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """Copy a work tree and a migrated database into `folder`, and make that MLflow store the current one."""
    shutil.copytree(exported, folder, dirs_exist_ok=True)
    shutil.copy(database, folder / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(folder / "scratch"))
    monkeypatch.chdir(ROOT)
    return Workspace(folder)


def loaded(alias: str = "champion") -> PyFuncModel:
    """Load the registered model as a user does."""
    import mlflow

    return mlflow.pyfunc.load_model(f"models:/{NAME}@{alias}")


def everything(work: Workspace) -> dict[str, Any]:
    """Return everything that a second call must leave unchanged."""
    runs = [*work.runs("training"), *work.runs("evaluation")]
    return {
        "versions": {number: (v.tags, v.description, v.source) for number, v in work.versions.items()},
        "aliases": work.aliases,
        "runs": [(r.info.run_id, r.info.status, r.info.end_time, r.data.params, r.data.tags) for r in runs],
        "points": [work.history(r.info.run_id, name) for r in runs for name in sorted(r.data.metrics)],
        "artifacts": sorted(str(path) for path in (work.root / "mlruns").rglob("*") if path.is_file()),
    }


def write_digits(folder: Path) -> None:
    """180 real digits, noughts, ones and twos, a third of them held out."""
    from sklearn.datasets import load_digits

    from tasks.pictures import images

    digits = load_digits()
    chosen = np.flatnonzero(digits.target < 3)[:180]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    writer = images.Writer(folder, shards=1)
    for number, row in enumerate(chosen):
        file = io.BytesIO()
        Image.fromarray((digits.images[row] * (255 / 16)).astype(np.uint8)).save(file, "PNG")
        text = dict.fromkeys(("sha256", "phash", "source"), "") | {"licence": "CC0", "mode": "L"}
        split = "test" if number % 3 == 0 else "train"
        size = {"width": 8, "height": 8, "label": int(digits.target[row]), "captions": [], "safety": None}
        writer.add({"key": f"{number:03d}", "image": file.getvalue(), "split": split, **text, **size})
    index = replace(writer.close(), classes=model_outputs.CLASSES, source="pets", licence="CC0")
    index.write(folder / "index.json")
