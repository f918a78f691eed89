"""The registry after any history: right aliases, no version twice, none lost, everything logged that was lost."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from tasks import params
from tasks.formats import model_folder
from tasks.params import EvaluateParams, ImageParams, JudgeParams
from tasks.register import register
from tasks.registration import unchanged
from tasks.runtime import measures, tracking
from tasks.training import tracked
from tests.support import model_outputs
from tests.support.registry import NAME, PARAMS, ROOT, everything, loaded, write_digits


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
    assert tracking.logged_images(work.client, nested.info.run_id) == {("grid_guided", 100), ("edit_fills", 0)}
    figures = work.client.list_artifacts(nested.info.run_id, "report/figures")
    assert [file.path for file in figures] == ["report/figures/samples.png"]
    assert nested.data.metrics["edit/inpainting_half_known_error"] == 0
    assert [file.path for file in work.client.list_artifacts(nested.info.run_id, "editing")] == ["editing/fills.png"]
    (logged,) = work.client.search_logged_models([tracking.experiment_id(work.client)])
    assert logged.source_run_id == trained.info.run_id
    assert {metric.key: metric.value for metric in logged.metrics}["eval/frechet_distance_unguided"] == 20.0
    folder, kept = work.client.list_artifacts(trained.info.run_id, "lineage")
    assert {Path(file.path).name for file in work.client.list_artifacts(trained.info.run_id, folder.path)} == {
        "dvc.lock",
        "params.yaml",
    }
    facts = json.loads(Path(work.client.download_artifacts(trained.info.run_id, kept.path)).read_text())
    assert facts["data_sha256"] == "d" * 64
    assert facts["git"]["commit"] == version.tags.get("afterimage.git_commit")


def test_a_second_run_changes_nothing(work):
    work.register()
    before = everything(work)
    (work.root / "scratch" / unchanged.FILE).unlink()  # otherwise it would not even look
    work.again()
    assert everything(work) == before


def test_an_unchanged_registration_does_not_ask_mlflow(work, monkeypatch, capsys):
    work.register()
    printed = capsys.readouterr().out.splitlines()[-2:]
    with monkeypatch.context() as patch:
        patch.delattr(tracking, "connect")
        register(*work.paths(), PARAMS)
    assert capsys.readouterr().out.splitlines() == printed

    registration = unchanged.Registration(work.paths(), PARAMS)
    assert registration.recorded() == printed
    assert unchanged.Registration(work.paths(), PARAMS.model_copy(update={"max_near_copies": 0.1})).recorded() is None
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "4.0.0")
    assert registration.recorded() is None


def test_a_registration_after_a_change_asks_mlflow(work, monkeypatch):
    work.register()
    registration, mlruns = unchanged.Registration(work.paths(), PARAMS), work.root / "mlruns"
    changes = {
        "an input": (work.root / "reports" / "figures" / "samples.png").touch,
        "an artifact": lambda: next(mlruns.rglob("protocol.json")).unlink(),
        "the model": lambda: next((mlruns / "models").rglob("MLmodel")).unlink(),
        "the database": lambda: work.client.delete_registered_model_alias(NAME, "challenger"),
        "the address": lambda: monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{work.root / 'other.db'}"),
    }
    kept = json.loads((work.root / "scratch" / unchanged.FILE).read_text())["kept"]
    for what, change in changes.items():
        registration.record(kept, ["done"])
        assert registration.recorded() == ["done"], what
        change()
        assert registration.recorded() is None, what


def test_parameters_a_b_a(work):
    """The worse B is refused with its reason; going back to A finds A's version and run again."""
    a, b = {"learning_rate": 1e-3, "distance": 20.0}, {"learning_rate": 2e-3, "distance": 25.0}
    work.register(**a)
    work.register(**b)
    assert work.aliases == {"challenger": 2, "champion": 1}
    assert (
        "25 (unguided) does not beat the champion's 20 by more than the 95% interval of the difference over 3"
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


@pytest.mark.slow
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


def test_only_missing_points_are_logged_again(work):
    model_outputs.write_reports(work.root)
    facts = model_outputs.read(work.root / "reports" / "train" / "run.json")
    tracking.connect()
    with tracked.training_run(facts["train_key"], facts["params"], facts["dataset"]) as run:
        for step in (10, 20, 50):
            run.metrics(step, {"loss": 2e-3 / step})
    work.register()
    assert sorted(work.history(run.run_id)) == [(step, 2e-3 / step) for step in model_outputs.STEPS]


def test_a_champion_that_cannot_be_measured_again_is_kept(work):
    work.register(learning_rate=1e-3, distance=20.0)
    shutil.rmtree(work.root / "mlruns" / "models")
    work.register(learning_rate=2e-3, distance=10.0, fingerprint="0" * 64)
    assert work.aliases == {"challenger": 2, "champion": 1}
    assert work.promotion(2).startswith("champion version 1 cannot be measured under this protocol (")


def test_a_champion_measured_another_way_is_sampled_again(work, capsys):
    """Really: its weights are fetched from MLflow, drawn from and judged as the challenger was."""
    from models.judges.judge import load_judge
    from models.pipeline import load_pipeline
    from tasks.evaluation.protocol import FILE, declare
    from tasks.evaluation.summary import measure
    from tasks.judge import judge

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
        n_slowest=2,
        guidance_scale=1.5,
        seed_blocks=3,
        allow_small_n=True,
    )
    declared = declare(pipeline, data, load_judge(folder), params)
    same_weights = measure(pipeline, data, load_judge(folder), declared)
    distance = same_weights.measures["frechet_distance"]
    lenient = PARAMS.model_copy(update={"max_distance_over_floor": 1e9, "min_label_accuracy": 0.0})

    def challenge(factor: float) -> None:
        """A challenger that claims `factor` times the distance that the champion's weights really have."""
        claimed = distance.model_copy(update={"value": distance.value * factor})
        found = {"measures": {**same_weights.measures, "frechet_distance": claimed}}
        same_weights.model_copy(update=found).write(work.root / "reports" / "evaluation" / measures.FILE)
        declared.write(work.root / "reports" / "evaluation" / FILE)
        model_outputs.run_package(work.root)
        work.again(lenient)

    challenge(1.0)
    assert work.aliases == {"challenger": 2, "champion": 1}
    shown = f"{distance.value:.4g}"
    assert f"{shown} (unguided) does not beat the champion's {shown} by more than" in work.promotion(2)
    assert "measuring version 1" in capsys.readouterr().out
    challenge(0.1)
    assert work.aliases == {"challenger": 3, "champion": 3}
    assert work.promotion(3) == "promoted: beats version 1"
    assert "measuring version" not in capsys.readouterr().out, "its numbers are remembered on the version"
    declared = replace(declared, headline="cmmd")
    same_weights = same_weights.model_copy(update={"headline": "cmmd"})
    challenge(1.01)
    shown = f"{same_weights.measures['cmmd'].value:.4g}"
    assert f"cmmd {shown} (unguided) does not beat the champion's {shown} by more than" in work.promotion(4)
    assert "measuring version 3" in capsys.readouterr().out, "its tags hold another distance"


def register_command(work) -> list[str]:
    """The stage as a process, with the digits' parameters for images as large as those of the model."""
    document = params.read(ROOT / "params.yaml")
    document["image"]["resolution"] = model_outputs.SIZE
    file = work.root / "params.yaml"
    file.write_text(yaml.safe_dump(document))
    return [sys.executable, "-m", "tasks.register", *map(str, work.paths()), "--params", str(file)]


@pytest.mark.slow
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


def blind_at_first(search):
    """A search that finds nothing when it is asked for something the first time."""
    asked = set()

    def call(client, *arguments, **options):
        seen = str(arguments) in asked
        asked.add(str(arguments))
        return search(client, *arguments, **options) if seen else []

    return call


def test_what_another_machine_registered_meanwhile_is_kept_and_not_repeated(work, monkeypatch):
    """Its lock excludes nobody there: each search before a creation finds nothing."""
    work.register()
    before = everything(work)
    for name in ("search_model_versions", "search_runs"):
        monkeypatch.setattr(MlflowClient, name, blind_at_first(getattr(MlflowClient, name)))
    work.again()
    monkeypatch.undo()
    assert everything(work) == before


@pytest.mark.slow
def test_killed_at_any_moment_the_next_run_completes_it(work):
    """After SIGKILL at each write to MLflow in turn, no version, run or point is missing or repeated."""
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
