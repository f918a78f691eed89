"""Stages decode the pixels that they need: counted where an image is decoded."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from models.judges.judge import load_judge
from models.pipeline import load_pipeline
from tasks.evaluation import scorer as scoring
from tasks.evaluation.extraction import Images
from tasks.evaluation.protocol import declare
from tasks.evaluation.scorer import Scorer
from tasks.params import EvaluateParams
from tasks.pictures import decoding, images
from tests.support import judge_inputs

PARAMS = EvaluateParams(
    sampler="ddim", steps=2, n_distance=12, n_accuracy=6, n_compare=6, n_slowest=2, guidance_scale=2.0, seed=5
)


@pytest.fixture
def decoded(monkeypatch):
    """The resolutions of the images that were decoded, one entry for each."""
    seen, lock, decode = [], threading.Lock(), decoding.decode_resized

    def counted(data, pixels, resolution, channels):
        with lock:
            seen.append(resolution)
        return decode(data, pixels, resolution, channels)

    monkeypatch.setattr(decoding, "decode_resized", counted)
    return seen


def test_chosen_rows_are_those_of_the_whole_split(judged, decoded):
    folder = judged / "data" / "images"
    whole = images.load_pixels(folder, "train", judge_inputs.IMAGE)
    assert whole.rows is None and len(decoded) == len(whole.keys) > 300
    decoded.clear()
    wanted = np.array([200, 7, 7, 33])
    some = images.load_pixels(folder, "train", judge_inputs.IMAGE, lambda labels: wanted)
    assert len(decoded) == 3 and some.pixels.shape == (3, 1, 8, 8)
    assert np.array_equal(some.at(wanted), whole.pixels[wanted])
    assert (some.keys, some.captions) == (whole.keys, whole.captions)
    assert np.array_equal(some.labels, whole.labels)
    for missing in (8, 300):
        with pytest.raises(ValueError, match="pixels are asked for that were not read"):
            some.at(np.array([7, missing]))


def test_no_chosen_row_decodes_nothing(judged, decoded):
    none = images.load_pixels(judged / "data" / "images", "train", judge_inputs.IMAGE, lambda labels: np.arange(0))
    assert decoded == [] and len(none.pixels) == 0 and len(none.keys) > 300
    assert len(none.at(np.arange(0))) == 0


def test_row_groups_without_a_chosen_row_are_not_read(judged, monkeypatch):
    read = []
    original = images.pq.ParquetFile.iter_batches

    def noted(self, *arguments, **options):
        read.append(options["row_groups"])
        return original(self, *arguments, **options)

    monkeypatch.setattr(images.pq.ParquetFile, "iter_batches", noted)
    images.load_pixels(judged / "data" / "images", "train", judge_inputs.IMAGE, lambda labels: np.arange(0))
    assert read == []


def test_the_scorer_decodes_what_it_compares_with_and_finds_the_same(judged, tmp_path, decoded, monkeypatch):
    (tmp_path / "data").symlink_to(judged / "data")
    judge_inputs.write_pipeline(tmp_path)
    folder, judge = judged / "data" / "images", load_judge(judged / "judge")
    declared = declare(load_pipeline(tmp_path / "outputs" / "pipeline"), folder, judge, PARAMS)
    monkeypatch.setattr(scoring, "SEARCHED", 50)
    few = Scorer(folder, judge, declared)
    limited = len(decoded) - len(few.held_out.keys)
    assert limited < 50 + 3 * 12 + 3 * 12 + 1 < len(few.train.keys)
    monkeypatch.setattr(Scorer, "_needed", lambda self, labels: np.arange(len(labels)))
    whole = Scorer(folder, judge, declared)
    drawn = Images.of(whole.train.pixels[:12].copy())
    for block in range(3):
        assert np.array_equal(few.stand_ins(block).pixels, whole.stand_ins(block).pixels)
    assert np.array_equal(few.searched.features, whole.searched.features)
    for label in range(3):
        assert few.class_distance(drawn, label) == whole.class_distance(drawn, label)
    assert np.array_equal(few.nearest_training(drawn), whole.nearest_training(drawn))
