"""Names, tags and metric groups of MLflow runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tasks import preset
from tasks.params import composition
from tasks.registration import adapter
from tasks.runtime import run_labels
from tests.support import model_outputs


def params_file(folder: Path, *overrides: str, name: str = "digits") -> Path:
    """A params.yaml as `tasks.preset` writes it; `overrides` differ from the preset."""
    path = folder / "params.yaml"
    path.write_text(preset.dump(composition.compose(name, list(overrides)), name), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("overrides", "kind", "name"),
    [
        ([], "training", "digits 12345678"),
        (["train.learning_rate=0.001"], "training", "digits train.learning_rate=0.001 12345678"),
        (["evaluate.steps=50", "train.steps=60"], "evaluation", "digits evaluation evaluate.steps=50 12345678"),
        (["evaluate.steps=50", "train.steps=60"], "training", "digits train.steps=60 12345678"),
        (
            ["train.steps=60", "train.batch_size=8", "train.clip_norm=0.5", "train.seed=4", "train.weight_decay=0.0"],
            "training",
            "digits train.steps=60 train.batch_size=8 train.weight_decay=0 +2 12345678",
        ),
    ],
)
def test_a_run_is_named_by_preset_changes_and_a_short_key(tmp_path, overrides, kind, name):
    assert run_labels.label(kind, "1234567890", {}, params_file(tmp_path, *overrides)).name == name


def test_the_parameters_of_the_run_itself_count(tmp_path):
    own = {"train.learning_rate": 0.004, "train.ema": '["std-0.05", "std-0.10"]', "train.seed": 9}
    assert run_labels.label("training", "k" * 64, own, params_file(tmp_path)).name == "digits train.seed=9 kkkkkkkk"


def test_a_preset_whose_images_a_person_names_is_compared_with_itself(tmp_path):
    path = params_file(tmp_path, f"download.path={tmp_path}", "train.seed=5", name="folder")
    assert run_labels.label("training", "k" * 64, {}, path).name == "folder train.seed=5 kkkkkkkk"


def test_without_parameters_the_name_contains_the_kind(tmp_path):
    assert run_labels.label("training", "k" * 64, {}, tmp_path / "params.yaml").name == "training kkkkkkkk"


def test_tags_fit_into_a_column(tmp_path, monkeypatch):
    path = params_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_EXP_NAME", "faster")
    subprocess.run(["git", "init", "--quiet"], check=True)
    author = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "core.hooksPath="]
    subprocess.run(["git", *author, "commit", "--quiet", "--allow-empty", "-m", "one"], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert run_labels.label("training", "k" * 64, {}, path).tags == {
        "preset": "digits",
        "dvc_experiment": "faster",
        "git_commit": commit[:8],
    }


def test_metrics_are_grouped_and_say_their_guidance():
    assert run_labels.training_metrics({"loss": 1.0, "held_out_loss/std-0.10": 2.0}) == {
        "train/loss": 1.0,
        "train/held_out_loss_std-0.10": 2.0,
    }
    assert run_labels.evaluation_metrics(model_outputs.measurements()) == {
        "eval/frechet_distance_unguided": 20.0,
        "eval/frechet_distance_spread": 1.0,
        "eval/frechet_distance_floor": 10.0,
        "eval/frechet_distance_floor_spread": 0.5,
        "eval/label_accuracy_guided": 0.99,
        "eval/label_accuracy_spread": 0.01,
        "eval/label_accuracy_real": 1.0,
        "eval/guided_scale": 1.5,
    }


def test_a_description_holds_the_numbers_with_their_guidance_and_links_the_report():
    text = run_labels.description(model_outputs.measurements(), "#/report")
    assert "| frechet_distance | none | 20 | 1 | 10 |" in text
    assert "| label_accuracy | 1.5 | 0.99 | 0.01 | 1 |" in text
    assert "[The report](#/report)" in text


def test_a_description_begins_with_what_the_gates_check():
    measured = model_outputs.measurements()
    measured = measured.model_copy(update={"measures": dict(sorted(measured.measures.items(), reverse=True))})
    rows = run_labels.description(measured, None).splitlines()[2:]
    assert [row.split()[1] for row in rows[:2]] == ["frechet_distance", "label_accuracy"]
    assert len(rows) >= len(measured.measures)


@pytest.mark.parametrize(
    ("params", "base"),
    [
        ({"train.weights": "owner/base", "train.pin": "c0ffee"}, adapter.Base("owner/base", "c0ffee")),
        ({"train.weights": "weights", "train.pin": "0" * 64}, adapter.Base("./weights")),
        ({"train.weights": "s3://bucket/a/base/", "train.pin": "0" * 64}, adapter.Base("./base")),
        ({"train.weights": "None", "train.init_from": "pipeline"}, adapter.Base("./pipeline")),
        ({"train.weights": "None", "train.init_from": "x", "train.full_steps": "5"}, None),
    ],
)
def test_an_adapter_names_its_base(params, base):
    assert adapter.base_of(params) == base
