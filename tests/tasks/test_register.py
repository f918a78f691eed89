"""The registry after any history: the right aliases, no version twice, none lost, everything replayed."""

from __future__ import annotations

import csv
import html
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tasks.formats import model_folder
from tasks.formats.model_card import model_card
from tasks.params import EvaluateParams, ImageParams, JudgeParams, RegisterParams
from tasks.register import register
from tasks.registration import gates
from tasks.runtime import lineage, measures, tracking
from tests.support import model_outputs
from tests.support.report_inputs import MEASURED

ROOT = Path(__file__).parents[2]
NAME = "afterimage-test"
PARAMS = RegisterParams(model_name=NAME, max_distance_over_floor=3.0, min_label_accuracy=0.95)


@dataclass
class Workspace:
    """A work tree in which everything before `register` has run, with an MLflow of its own."""

    root: Path
    client: Any = None

    def register(self, params: RegisterParams = PARAMS, **reports: Any) -> None:
        """Write the reports of a run, package its model and register it."""
        model_outputs.write_reports(self.root, **reports)
        model_outputs.run_package(self.root)
        self.again(params)

    def again(self, params: RegisterParams = PARAMS) -> None:
        """`register` alone, on the files as they are."""
        register(*self.paths(), params)
        self.client = tracking.connect()

    def paths(self) -> list[Path]:
        outputs, reports = self.root / "outputs", self.root / "reports"
        inputs = [outputs / "model", outputs / "judge", self.root / "data" / "images", reports / "train"]
        evaluation = [reports / "evaluation", reports / "timing" / "evaluate.json"]
        return [*inputs, *evaluation, reports / "export.json", reports / "index.html"]

    @property
    def aliases(self) -> dict[str, int]:
        return {name: int(v) for name, v in self.client.get_registered_model(NAME).aliases.items()}

    @property
    def versions(self) -> dict[int, Any]:
        return {int(v.version): v for v in self.client.search_model_versions(f"name = '{NAME}'")}

    def promotion(self, version: int) -> str:
        return self.client.get_model_version(NAME, str(version)).tags["afterimage.promotion"]

    def runs(self, kind: str) -> list:
        found = self.client.search_runs([tracking.experiment_id(self.client)], order_by=["start_time"])
        return [run for run in found if run.data.tags[tracking.KIND] == kind]

    def history(self, run_id: str, name: str = "train/loss") -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in self.client.get_metric_history(run_id, name)]


def workspace_in(folder: Path, exported: Path, database: Path, monkeypatch) -> Workspace:
    shutil.copytree(exported, folder, dirs_exist_ok=True)
    shutil.copy(database, folder / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(folder / "scratch"))
    monkeypatch.chdir(ROOT)
    return Workspace(folder)


@pytest.fixture
def work(tmp_path, exported, migrated_database, monkeypatch) -> Workspace:
    return workspace_in(tmp_path, exported, migrated_database, monkeypatch)


def loaded(alias: str = "champion"):
    import mlflow

    return mlflow.pyfunc.load_model(f"models:/{NAME}@{alias}")


def everything(work: Workspace) -> dict[str, Any]:
    """All that a second call must leave as it is."""
    runs = [*work.runs("training"), *work.runs("evaluation")]
    return {
        "versions": {number: (v.tags, v.description, v.source) for number, v in work.versions.items()},
        "aliases": work.aliases,
        "runs": [(r.info.run_id, r.info.status, r.info.end_time, r.data.params, r.data.tags) for r in runs],
        "points": [work.history(r.info.run_id, name) for r in runs for name in sorted(r.data.metrics)],
        "artifacts": sorted(str(path) for path in (work.root / "mlruns").rglob("*") if path.is_file()),
    }


def test_first_version_is_challenger_and_champion_with_all_that_belongs_to_it(work, capsys):
    work.register()
    assert work.aliases == {"challenger": 1, "champion": 1}
    assert capsys.readouterr().out.splitlines()[-2] == f"register: {NAME} version 1, challenger and champion"
    version = work.versions[1]
    assert version.tags["afterimage.content_key"] == model_folder.content_key(work.root / "outputs" / "model")
    assert version.tags["afterimage.data_sha256"] == "d" * 64
    assert "# Diffusion model of pets" in version.description

    (trained,) = work.runs("training")
    assert (trained.info.status, version.run_id) == ("FINISHED", trained.info.run_id)
    assert trained.data.params["train.learning_rate"] == "0.002"
    assert trained.data.metrics["eval/frechet_distance_unguided"] == 20.0
    assert trained.data.metrics["codec/autoencoder_psnr"] == 23.5
    assert {name.split("/")[0] for name in trained.data.metrics} == {"train", "eval", "codec"}
    assert tracking.logged_images(work.client, trained.info.run_id) == {("samples", 100), ("reconstructions", 0)}
    with (work.root / "reports" / "train" / "history.csv").open() as file:
        rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    assert work.history(trained.info.run_id) == rows
    assert work.history(trained.info.run_id, "train/held_out_loss") == [(100, 0.5)]

    (nested,) = work.runs("evaluation")
    assert nested.data.tags["mlflow.parentRunId"] == trained.info.run_id
    assert nested.data.params["measurement.n_distance"] == "64"
    assert json.loads(nested.data.params["measurement.labels"]) == model_outputs.CLASSES
    assert nested.data.metrics["eval/label_accuracy_guided"] == 0.99
    assert {file.path for file in work.client.list_artifacts(nested.info.run_id, "evaluation")} == {
        "evaluation/grid_guided.png",
        "evaluation/measurements.json",
        "evaluation/protocol.json",
    }
    assert tracking.logged_images(work.client, nested.info.run_id) == {("grid_guided", 100)}
    (logged,) = work.client.search_logged_models([tracking.experiment_id(work.client)])
    assert logged.source_run_id == trained.info.run_id
    assert {metric.key: metric.value for metric in logged.metrics}["eval/frechet_distance_unguided"] == 20.0
    (kept,) = work.client.list_artifacts(trained.info.run_id, "lineage")
    facts = json.loads(Path(work.client.download_artifacts(trained.info.run_id, kept.path)).read_text())
    assert facts["data_sha256"] == "d" * 64
    assert facts["git"]["commit"] == version.tags.get("afterimage.git_commit")


def test_registered_model_draws_what_pytorch_draws(work):
    from models.pipeline import load_pipeline
    from models.pixels import to_uint8
    from models.samplers import Sampling

    work.register()
    model = loaded()
    (request_,) = model.metadata.signature.inputs.to_dict()
    wishes = {"label", "prompt", "seed", "steps", "sampler", "eta", "guidance", "guidance_interval"}
    assert set(request_["properties"]) == wishes
    requirements = (Path(work.versions[1].source) / "requirements.txt").read_text().split()
    assert {line.split("==")[0] for line in requirements} == {"mlflow", "numpy", "onnxruntime", "pillow", "pydantic"}
    assert all(line.split("==")[1][0].isdigit() for line in requirements)
    wish = {"eta": 0.5, "guidance_interval": [0.1, 2.0]}
    first, second = model.predict(
        [
            {"prompt": "a cat", "seed": 5, "steps": 6, "sampler": "ddim", "guidance": 1.5},
            {"label": 2, "seed": 6, "steps": 6, "sampler": "ddim", "guidance": 1.5} | wish,
        ]
    )
    pipeline = load_pipeline(work.root / "outputs" / "pipeline")
    expected = to_uint8(
        np.concatenate(
            [
                pipeline.sample([5], [2], Sampling("ddim", 6, guidance_scale=1.5)),
                pipeline.sample([6], [2], Sampling("ddim", 6, 0.5, 1.5, (0.1, 2.0))),
            ]
        )
    )
    for png, image in zip((first, second), expected, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(png), formats=["PNG"]))
        assert np.abs(pixels.astype(int) - image[0]).max() <= 1
    assert first != second
    assert model.predict(model.input_example)[0][:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        ({"label": 0, "step": 5}, "step"),
        ({"label": 0, "seed": "one"}, "seed"),
        ({"prompt": "a bird"}, "names no class"),
        ({"prompt": "a cat and a dog"}, "names dog, cat"),
        ({"prompt": "cat", "label": 1}, "not both"),
        ({"label": 7}, "between 0 and 2"),
        ({}, "needs a label"),
        ({"label": 0, "sampler": "euler"}, "unknown sampler"),
        ({"label": 0, "steps": 21}, "sampling steps 21"),
    ],
)
def test_registered_model_refuses_what_it_cannot_do(registered, request_, complaint):
    with pytest.raises(Exception, match=complaint):
        registered.predict([request_])


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        ({"label": 7}, "labels must lie between 0 and 2"),
        ({"prompt": "a bird"}, "names no class; name exactly one of"),
        ({"label": 0, "steps": 21}, "sampling steps 21"),
        ({"label": 0, "sampler": "euler"}, "unknown sampler 'euler'"),
        ({"label": 0, "step": 5}, "step"),
        ({"label": 0, "seed": "one"}, "seed"),
    ],
)
def test_served_model_answers_a_wrong_request_without_a_stack_trace(registered, request_, complaint):
    """Through the application that `mlflow models serve` runs."""
    from fastapi.testclient import TestClient
    from mlflow.pyfunc import scoring_server

    with TestClient(scoring_server.init(registered)) as client:
        answer = client.post("/invocations", json={"inputs": [request_]})
        right = client.post("/invocations", json={"inputs": [{"label": 0, "seed": 1, "steps": 2}]})
    assert (answer.status_code, right.status_code) == (400, 200)
    assert "stack_trace" not in answer.json() and "Traceback" not in answer.text
    assert complaint in answer.json()["message"]


@pytest.fixture(scope="module")
def registered(tmp_path_factory, exported, migrated_database):
    """The registered model, loaded once for all wrong requests."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        work = workspace_in(tmp_path_factory.mktemp("registered"), exported, migrated_database, monkeypatch)
        work.register()
        return loaded()


def test_an_unconditional_model_is_registered_and_draws(
    tmp_path, exported_unconditional, migrated_database, monkeypatch
):
    work = workspace_in(tmp_path, exported_unconditional, migrated_database, monkeypatch)
    model_outputs.write_reports(work.root, label_accuracy=None, guided_scale=None)
    model_outputs.run_package(work.root)
    work.again()
    assert work.aliases == {"challenger": 1, "champion": 1}
    assert loaded().predict([{"seed": 1, "steps": 3}])[0][:4] == b"\x89PNG"
    with pytest.raises(Exception, match="unconditional"):
        loaded().predict([{"prompt": "cat", "steps": 3}])


def test_a_second_run_changes_nothing(work):
    work.register()
    before = everything(work)
    work.again()
    assert everything(work) == before


def test_parameters_a_b_a(work):
    """The worse B is refused with its reason; going back to A finds A's version and run again."""
    a, b = {"learning_rate": 1e-3, "distance": 20.0}, {"learning_rate": 2e-3, "distance": 25.0}
    work.register(**a)
    work.register(**b)
    assert work.aliases == {"challenger": 2, "champion": 1}
    assert (
        "25 (unguided) does not beat the champion's 20 by more than the spread between seed blocks 1"
        in work.promotion(2)
    )
    work.register(**a)
    assert work.aliases == {"challenger": 1, "champion": 1}
    assert sorted(work.versions) == [1, 2]
    assert len(work.runs("training")) == len(work.runs("evaluation")) == 2
    assert work.promotion(1) == "promoted: first to pass the gates"
    for run in work.runs("training"):
        assert len(work.history(run.info.run_id)) == len(model_outputs.STEPS)


def test_a_better_version_takes_over_and_the_old_one_does_not_take_it_back(work):
    work.register(learning_rate=1e-3, distance=20.0)
    work.register(learning_rate=2e-3, distance=18.0)
    assert work.aliases == {"challenger": 2, "champion": 2}
    assert work.promotion(2) == "promoted: beats version 1"
    work.register(learning_rate=1e-3, distance=20.0)
    assert work.aliases == {"challenger": 1, "champion": 2}
    assert "does not beat" in work.promotion(1)


def test_another_evaluation_of_the_same_weights_is_another_nested_run(work):
    work.register(distance=20.0)
    work.register(distance=20.5, n_samples=128)
    (trained,) = work.runs("training")
    assert [run.data.tags["mlflow.parentRunId"] for run in work.runs("evaluation")] == [trained.info.run_id] * 2
    assert trained.data.metrics["eval/frechet_distance_unguided"] == 20.5
    work.register(distance=20.0)
    assert work.runs("training")[0].data.metrics["eval/frechet_distance_unguided"] == 20.0
    assert len(work.runs("evaluation")) == 2


def test_a_first_version_that_fails_the_gates_is_challenger_only(work, capsys):
    work.register(distance=31.0)
    assert work.aliases == {"challenger": 1}
    assert "3.10 times its floor 10" in work.promotion(1)
    assert "challenger; no champion: frechet_distance" in capsys.readouterr().out
    work.register(distance=20.0, label_accuracy=0.9)
    assert work.aliases == {"challenger": 2}
    assert "label_accuracy 0.900 (guidance 1.5) is under" in work.promotion(2)
    work.again(PARAMS.model_copy(update={"min_label_accuracy": 0.8}))
    assert work.aliases == {"challenger": 2, "champion": 2}


def test_a_deleted_database_is_filled_again(work, migrated_database, monkeypatch):
    work.register()
    before = everything(work)
    (work.root / "mlflow.db").unlink()
    work.root = work.root.rename(work.root.with_name("moved"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{work.root / 'mlflow.db'}")
    shutil.copy(migrated_database, work.root / "mlflow.db")
    work.again()
    after = everything(work)
    assert after["aliases"] == before["aliases"] == {"challenger": 1, "champion": 1}
    assert after["points"] == before["points"]
    assert [run[3] for run in after["runs"]] == [run[3] for run in before["runs"]]
    assert loaded().predict([{"label": 0, "steps": 2}])[0][:4] == b"\x89PNG"


def test_deleted_artifacts_versions_and_runs_come_back(work):
    work.register()
    shutil.rmtree(work.root / "mlruns" / "models")
    work.again()
    assert sorted(work.versions) == [1]
    assert loaded().predict([{"label": 0, "steps": 2}])[0][:4] == b"\x89PNG"
    work.client.delete_model_version(NAME, "1")
    work.client.delete_run(work.runs("training")[0].info.run_id)
    work.again()
    assert work.aliases == {"challenger": 2, "champion": 2}
    assert len(work.runs("training")) == 1


def test_points_that_were_lost_on_the_way_are_replayed_and_no_other(work):
    model_outputs.write_reports(work.root)
    facts = model_outputs.read(work.root / "reports" / "train" / "run.json")
    tracking.connect()
    with tracking.training_run(facts["train_key"], facts["params"], facts["dataset"]) as run:
        for step in (10, 20, 50):
            run.metrics(step, {"loss": 2e-3 / step})
    work.register()
    assert sorted(work.history(run.run_id)) == [(step, 2e-3 / step) for step in model_outputs.STEPS]


def test_a_champion_that_cannot_be_measured_alike_stays(work):
    work.register(learning_rate=1e-3, distance=20.0)
    shutil.rmtree(work.root / "mlruns" / "models")
    work.register(learning_rate=2e-3, distance=10.0, fingerprint="0" * 64)
    assert work.aliases == {"challenger": 2, "champion": 1}
    assert work.promotion(2).startswith("champion version 1 cannot be measured under this protocol (")


def write_digits(folder: Path) -> None:
    """180 real digits, noughts, ones and twos, a third of them held out."""
    from sklearn.datasets import load_digits

    from tasks.pictures import images
    from tasks.runtime import atomic

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
    index = {**writer.close(), "classes": model_outputs.CLASSES, "source": "pets", "licence": "CC0"}
    atomic.write_json(folder / "index.json", index)


def test_a_champion_measured_another_way_is_sampled_again(work, capsys):
    """Really: its weights are fetched from MLflow, drawn from and judged as the challenger was."""
    from models.judges.judge import load_judge
    from models.pipeline import load_pipeline
    from tasks.evaluation import protocol
    from tasks.judge import judge
    from tasks.runtime import atomic

    work.register(learning_rate=1e-3, distance=20.0)
    data, folder = work.root / "data" / "images", work.root / "outputs" / "judge"
    model_outputs.write_reports(work.root, learning_rate=2e-3)
    write_digits(data)
    size = ImageParams(resolution=model_outputs.SIZE, channels=1)
    judge(data, work.root / "data" / "accepted.json", folder, JudgeParams(classifier_steps=15, clip_steps=5), size)
    pipeline = load_pipeline(work.root / "outputs" / "pipeline")
    params = EvaluateParams(
        sampler="ddim",
        steps=3,
        n_distance=24,
        n_accuracy=12,
        n_compare=2,
        n_ddpm=2,
        guidance_scale=1.5,
        seed_blocks=3,
        allow_small_n=True,
    )
    declared = protocol.declare(pipeline, data, load_judge(folder), params)
    same_weights = protocol.measure(pipeline, data, load_judge(folder), declared)
    measure = same_weights.measures["frechet_distance"]
    lenient = PARAMS.model_copy(update={"max_distance_over_floor": 1e9, "min_label_accuracy": 0.0})

    def challenge(factor: float) -> None:
        """A challenger that claims `factor` times the distance that the champion's weights really have."""
        claimed = measure.model_copy(update={"value": measure.value * factor})
        found = {"measures": {**same_weights.measures, "frechet_distance": claimed}}
        same_weights.model_copy(update=found).write(work.root / "reports" / "evaluation" / measures.FILE)
        atomic.write_json(work.root / "reports" / "evaluation" / "protocol.json", declared)
        model_outputs.run_package(work.root)
        work.again(lenient)

    challenge(1.0)
    assert work.aliases == {"challenger": 2, "champion": 1}
    shown = f"{measure.value:.4g}"
    assert f"{shown} (unguided) does not beat the champion's {shown} by more than" in work.promotion(2)
    assert "measuring champion version 1" in capsys.readouterr().out
    challenge(0.1)
    assert work.aliases == {"challenger": 3, "champion": 3}
    assert work.promotion(3) == "promoted: beats version 1"
    assert "measuring champion" not in capsys.readouterr().out, "its numbers are remembered on the version"


@pytest.mark.slow
def register_command(work) -> list[str]:
    """The stage as a process, with the digits' parameters for images as large as those of the model."""
    document = yaml.safe_load((ROOT / "params.yaml").read_text())
    document["image"]["resolution"] = model_outputs.SIZE
    file = work.root / "params.yaml"
    file.write_text(yaml.safe_dump(document))
    return [sys.executable, "-m", "tasks.register", *map(str, work.paths()), "--params", str(file)]


def test_several_registrations_at_once_make_one_version(work):
    model_outputs.write_reports(work.root)
    model_outputs.run_package(work.root)
    command = register_command(work)
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [process.wait(timeout=200) for process in started] == [0, 0, 0]
    client = tracking.connect()
    name = "afterimage-digits"
    assert len(client.search_model_versions(f"name = '{name}'")) == 1
    assert len(client.search_runs([tracking.experiment_id(client)])) == 2


@pytest.mark.slow
def test_killed_at_any_moment_the_next_run_completes_it(work):
    """kill -9 after each of the writes to MLflow in turn: no version, run or point twice, none missing."""
    model_outputs.write_reports(work.root)
    model_outputs.run_package(work.root)
    (work.root / "sitecustomize.py").write_text(
        "import os, sqlite3\n"
        "commits = int(os.environ['COMMITS'])\n"
        "connect = sqlite3.connect\n"
        "class Mortal(sqlite3.Connection):\n"
        "    def commit(self):\n"
        "        global commits\n"
        "        wrote = self.total_changes > 0 and self.in_transaction\n"
        "        super().commit()\n"
        "        commits -= wrote\n"
        "        if commits == 0:\n"
        "            os.kill(os.getpid(), 9)\n"
        "sqlite3.connect = lambda *a, **k: connect(*a, **{**k, 'factory': Mortal})\n"
        "sqlite3.dbapi2.connect = sqlite3.connect\n"
    )
    command = register_command(work)
    ends = []
    for commits in range(1, 60):
        environment = os.environ | {"PYTHONPATH": str(work.root), "COMMITS": str(commits)}
        ends.append(subprocess.run(command, cwd=ROOT, env=environment, capture_output=True).returncode)
        if ends[-1] == 0:
            break
    assert ends[-1] == 0
    assert ends.count(-9) == len(ends) - 1 > 4
    client = tracking.connect()
    assert len(client.search_model_versions("name = 'afterimage-digits'")) == 1
    assert set(client.get_registered_model("afterimage-digits").aliases) == {"challenger", "champion"}
    runs = client.search_runs([tracking.experiment_id(client)])
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    for run in runs:
        for name in run.data.metrics:
            steps = [point.step for point in client.get_metric_history(run.info.run_id, name)]
            assert len(steps) == len(set(steps)), name
    assert len(client.search_logged_models([tracking.experiment_id(client)])) == 1


JUDGED = gates.Judged("f", 20.0, 1.0, 10.0, 0.96, 1.5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"frechet_distance_unguided": 30.0}, None),
        ({"frechet_distance_unguided": 30.1}, "30.1 (unguided) is 3.01 times its floor 10"),
        ({"frechet_distance_unguided": float("nan")}, "frechet_distance nan"),
        ({"label_accuracy_guided": 0.95}, None),
        ({"label_accuracy_guided": 0.949}, "label_accuracy 0.949 (guidance 1.5) is under"),
    ],
)
def test_absolute_gates(changes, reason):
    said = gates.not_good_enough(replace(JUDGED, **changes), PARAMS)
    assert said is None if reason is None else reason in said


def test_label_accuracy_is_no_gate_where_it_does_not_apply():
    assert gates.not_good_enough(replace(JUDGED, label_accuracy_guided=None), PARAMS) is None


@pytest.mark.parametrize(
    ("distance", "spread", "champions_spread", "wins"),
    [
        (18.9, 1.0, 1.0, True),
        (19.0, 1.0, 1.0, False),
        (18.9, 0.1, 1.5, False),
        (18.9, 1.5, 0.1, False),
        (20.0, 0.0, 0.0, False),
        (19.99, 0.0, 0.0, True),
        (float("nan"), 0.0, 0.0, False),
    ],
)
def test_a_challenger_must_win_by_more_than_the_larger_spread(distance, spread, champions_spread, wins):
    challenger = replace(JUDGED, frechet_distance_unguided=distance, frechet_distance_spread=spread)
    champion = replace(JUDGED, frechet_distance_spread=champions_spread)
    assert (gates.not_better(challenger, champion) is None) == wins


def test_numbers_with_different_fingerprints_are_never_compared():
    with pytest.raises(ValueError, match="not comparable"):
        gates.not_better(JUDGED, replace(JUDGED, fingerprint="g"))


def test_the_gates_read_back_what_they_wrote_on_a_version_and_nothing_of_an_earlier_form():
    assert gates.from_tags(JUDGED.tags()) == JUDGED
    unconditional = replace(JUDGED, label_accuracy_guided=None, guided_scale=None)
    assert gates.from_tags(unconditional.tags()) == unconditional
    assert gates.from_tags({"fingerprint": "f", "frechet_distance": "20.0", "frechet_distance_floor": "10.0"}) is None


def test_content_key_sees_names_and_bytes_and_no_caches(tmp_path):
    def key(**files: str) -> str:
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        for name, text in files.items():
            path = tmp_path / "m" / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return model_folder.content_key(tmp_path / "m")

    first = key(a="1", b__c="2")
    assert first == key(b__c="2", a="1")
    assert len({first, key(a="1", b__c="3"), key(a="1", b="2"), key(a="1"), key(a="12", b__c="")}) == 5
    (tmp_path / "m" / "__pycache__").mkdir(parents=True)
    before = model_folder.content_key(tmp_path / "m")
    (tmp_path / "m" / "__pycache__" / "x.pyc").write_bytes(b"1")
    assert model_folder.content_key(tmp_path / "m") == before


def test_package_gives_the_same_bytes_and_a_card_that_tells_all(work):
    model_outputs.write_reports(work.root)
    model_outputs.run_package(work.root)
    model = work.root / "outputs" / "model"
    first = model_folder.content_key(model)
    model_outputs.run_package(work.root)
    assert model_folder.content_key(model) == first
    card = (model / "README.md").read_text()
    for told in (
        "licence: CC0",
        "| train.learning_rate | 0.002 |",
        "| frechet_distance | 1 | 3 x 64 | 20 | 1 | 10 |",
        "| label_accuracy | 1.5 | 3 x 32 | 0.99 | 0.01 |  | 1 |",
        "f" * 64,
        "clip_score: the images have no captions",
        "--prompt 'hot dog'",
        "opset 20",
    ):
        assert told in card
    assert "log_every" not in card
    for file in (
        "pipeline/unet/config.json",
        "onnx/unet.onnx",
        "onnx/afterimage_bundle/bundle.py",
        "measurements.json",
    ):
        assert (model / file).is_file()


def test_card_of_an_unconditional_model_promises_no_prompt():
    info = {
        "conditioning": "none",
        "classes": [],
        "channels": 3,
        "size": 32,
        "latent": None,
        "timesteps": 1000,
        "schedule": "linear",
        "prediction": "epsilon",
        "train_key": "k",
    }
    data = {"source": "s", "rows": 2, "splits": {"train": 2}, "licence": "l", "sha256": "h"}
    exported = {"opset": 20, "max_abs_difference": 1e-6, "min_psnr_db": 99.0, "providers": ["p"]}
    card = model_card(info, data, {}, model_outputs.measurements(), exported | {"tensorrt": {"built": True}})
    assert "prompt" not in card
    assert "DiffusionPipeline.from_pretrained" in card


HOSTILE = [
    "<script>alert(1)</script>",
    "a|b",
    "`x`",
    "one\ntwo\n\n# three",
    "](javascript:alert(1))",
    "<img src=x onerror=alert(1)>",
    "&lt;b&gt;",
    "$(touch x)",
]


@pytest.mark.parametrize("conditioning", ["label", "text"])
@pytest.mark.parametrize("first", range(len(HOSTILE)))
def test_names_and_captions_in_the_card_are_text_and_nothing_else(conditioning, first):
    """Rendered with the parser of MLflow's documentation and of Python's Markdown world, CommonMark."""
    markdown = pytest.importorskip("markdown_it")
    names = [*HOSTILE[first:], *HOSTILE[:first]]
    info = {
        "conditioning": conditioning,
        "classes": names,
        "prompts": names if conditioning == "text" else None,
    } | {"channels": 3, "size": 32, "latent": None, "timesteps": 1000, "schedule": "linear"}
    info |= {"prediction": "epsilon", "train_key": "k"}
    data = {"source": "folder", "rows": 2, "splits": {"train": 2}, "licence": names[0], "sha256": "h"}
    exported = {"opset": 20, "max_abs_difference": 1e-6, "min_psnr_db": 99.0, "providers": ["p"]}
    exported["tensorrt"] = {"built": False, "reason": names[0]}
    training = {"train.weights": names[0], "model.lora_rank": 4, "ingest.caption_templates": names}
    measured = replace(MEASURED, not_applicable={"kid": names[0]})
    card = model_card(info, data, training, measured, exported)
    rendered = markdown.MarkdownIt("commonmark", {"html": True}).enable("table").render(card.split("---", 2)[2])
    assert not re.search(r"<(script|img)|href=.javascript|<h1>three", rendered)
    headings = re.findall(r"<h\d>(.*?)</h\d>", rendered)
    assert headings[1:] == ["How to use it", "Evaluation", "Export", "Data", "Training", "Limits"]
    rows = re.findall(r"<tr>\n?(.*?)</tr>", rendered.split("<h2>Training</h2>")[1], re.DOTALL)
    assert {row.count("<td>") + row.count("<th>") for row in rows} == {2}
    assert "<script>alert(1)</script>" in html.unescape(rendered)


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "core.hooksPath=", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_lineage_of_a_work_tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AFTERIMAGE_FLOW_RUN_ID", "flow-1")
    git(tmp_path, "init", "--quiet")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "code.py").write_text("a = 1\n")
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\nstages: {train: {cmd: x}, register: {cmd: y}}\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    clean = lineage.lineage("d")
    assert clean["git"] == {
        "commit": git(tmp_path, "rev-parse", "HEAD"),
        "dirty": False,
        "diff": "",
        "diff_is_cut": False,
        "left_out": {},
    }
    assert clean["dvc"]["stages"] == {"train": {"cmd": "x"}}
    assert clean["prefect_flow_run"] == "flow-1"

    (tmp_path / "dvc.lock").write_text("stages: {register: {cmd: z}, train: {cmd: x}}\n")
    assert lineage.lineage("d") == clean, "the entry of the stage that is running does not count, nor the order"
    (tmp_path / "tasks" / "code.py").write_text("a = 2\n")
    dirty = lineage.lineage("d")
    assert dirty["git"]["dirty"]
    assert "+a = 2" in dirty["git"]["diff"]
    (tmp_path / "tasks" / "code.py").write_text("a = 3\n" * 100_000)
    cut = lineage.lineage("d")["git"]
    assert cut["diff_is_cut"]
    assert lineage.DIFF_CHARACTERS - 10 < len(cut["diff"]) <= lineage.DIFF_CHARACTERS
    assert lineage.tags(dirty)["afterimage.git_dirty"] == "true"


@pytest.fixture
def changed_tree(tmp_path, monkeypatch) -> Path:
    """A work tree with uncommitted changes in code, parameters, settings and notes."""
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init", "--quiet")
    files = ("tasks/code.py", "tasks/other.py", "params.yaml", ".dvc/config", "notes.txt")
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("first\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    (tmp_path / "tasks" / "code.py").write_text("steps = 2  # twice\n")
    (tmp_path / "params.yaml").write_text(f"train:\n  steps: 20\n  pin: {'6d958be0' * 8}\n")
    (tmp_path / "tasks" / "other.py").write_text('password = "correct-horse-battery"\n')
    (tmp_path / ".dvc" / "config").write_text("secret_access_key = wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY\n")
    (tmp_path / "notes.txt").write_text("call 555\n")
    return tmp_path


def test_lineage_keeps_code_and_parameters_and_no_secret(changed_tree):
    facts = lineage.lineage("d")["git"]
    assert "+steps = 2" in facts["diff"] and "+  pin: 6d958be0" in facts["diff"]
    assert facts["left_out"] == {
        ".dvc/config": lineage.NOT_CODE,
        "notes.txt": lineage.NOT_CODE,
        "tasks/other.py": "holds what looks like a secret (Secret Keyword)",
    }
    assert not any(secret in json.dumps(facts) for secret in ("correct-horse", "wJalr", "555"))
    assert (
        lineage.tags(lineage.lineage("d"))["afterimage.git_diff_left_out"] == ".dvc/config, notes.txt, tasks/other.py"
    )


@pytest.mark.parametrize(
    "line",
    [
        "url: http://user:PASSWORD@host/x.zip",
        "url: https://host/x?X-Amz-Signature=6d958be074577803d12ecdefd02955f39262c83c",
        "HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyzABCDEF12",
        "key = 'AKIAIOSFODNN7EXAMPLE'",
        "secret_access_key: wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY",
        "-----BEGIN RSA PRIVATE KEY-----",
    ],
)
@pytest.mark.parametrize("name", ["tasks/code.py", "params.yaml"])
def test_lineage_knows_many_kinds_of_secrets_added_or_removed(changed_tree, line, name):
    (changed_tree / name).write_text(f"a: 1\n{line}\n")
    assert name in lineage.lineage("d")["git"]["left_out"]
    git(changed_tree, "commit", "-qam", "second")
    (changed_tree / name).write_text("a: 1\n")
    facts = lineage.lineage("d")["git"]
    assert list(facts["left_out"]) == [name] and facts["diff"] == ""


def test_lineage_stores_no_diff_that_nothing_scanned(changed_tree, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "detect_secrets" else find(name))
    facts = lineage.lineage("d")["git"]
    assert facts["diff"] == "" and facts["dirty"]
    assert facts["left_out"]["params.yaml"] == lineage.NO_SCANNER


def test_lineage_without_git_and_without_dvc(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("AFTERIMAGE_FLOW_RUN_ID", raising=False)
    facts = lineage.lineage("d")
    assert facts["git"]["commit"] is None
    assert facts["dvc"] == {"stages": None, "sha256": None}
    assert lineage.tags(facts) == {"afterimage.data_sha256": "d"}
