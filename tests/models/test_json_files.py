"""Descriptions with a format number: what is written is read, and another format is refused in a sentence."""

import json
from dataclasses import replace

import pytest

from models.bundle_info import BundleInfo, BundleText
from models.judges.judge import JudgeInfo
from models.noise.paths import DiffusionPath
from models.noise.samplers import SchedulerConfig
from models.pipeline import PipelineInfo

PIPELINE = PipelineInfo("label", 1, 8, "cosine", 20, "v_prediction", "a" * 64, ["dog", "chat noir é"], 2)
SCHEDULER = SchedulerConfig(DiffusionPath([0.9, 0.5]), "v_prediction", variance_type="fixed_large", steps_offset=1)
BUNDLE = BundleInfo.of(PIPELINE, SCHEDULER, BundleText(8, {"": 0, "_2": 3}, 16, [8, 8, 0, 0, 8, 8]))
JUDGE = JudgeInfo(["dog"], None, {"channels": 1, "size": 8}, 60, 20, clip_accuracy=0.5, hashes={"clip": "b" * 64})
DESCRIPTIONS = pytest.mark.parametrize("info", [PIPELINE, BUNDLE, JUDGE], ids=lambda info: type(info).__name__)


@DESCRIPTIONS
def test_a_description_survives_the_round_trip_in_the_same_bytes(tmp_path, info):
    info.write(tmp_path / "first.json")
    again = type(info).read(tmp_path / "first.json")
    assert again == info
    again.write(tmp_path / "second.json")
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()
    assert json.loads((tmp_path / "first.json").read_text(encoding="utf-8"))["format"] == type(info).FORMAT


@DESCRIPTIONS
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": 0}, "format 0, this version reads format"),
        ({"format": None}, "format None"),
        ("classes", "lacks classes"),
    ],
)
def test_another_format_or_a_missing_key_is_refused_in_a_sentence(tmp_path, info, change, sentence):
    file = tmp_path / "info.json"
    info.write(file)
    values = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(change, str):
        del values[change]
    else:
        values |= change
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=sentence) as error:
        type(info).read(file)
    assert str(file) in str(error.value) and str(error.value).endswith(type(info).REMEDY)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_description_is_refused(tmp_path):
    (tmp_path / "info.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="format None"):
        PipelineInfo.read(tmp_path / "info.json")


def test_keys_of_other_versions_are_ignored(tmp_path):
    PIPELINE.write(tmp_path / "info.json")
    values = json.loads((tmp_path / "info.json").read_text(encoding="utf-8"))
    (tmp_path / "info.json").write_text(json.dumps(values | {"condition_source": "label"}))
    assert PipelineInfo.read(tmp_path / "info.json") == PIPELINE


def test_accuracies_that_were_not_measured_are_absent():
    assert JUDGE.to_json()["clip_accuracy"] == 0.5
    assert not {"classifier_accuracy", "clip_choices", "self_supervised_accuracy"} & set(JUDGE.to_json())
    assert JUDGE.to_json()["extractor"] is None


def test_a_bundle_without_text_encoder_has_no_text_section():
    assert "text" not in replace(BUNDLE, text=None).to_json()


def test_the_bundle_samples_as_the_trained_scheduler_prescribes():
    assert BUNDLE.scheduler == SCHEDULER
    assert not replace(BUNDLE, latent=[4, 8]).scheduler.clip_sample
