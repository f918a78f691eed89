"""Stages decode the pixels that they need: counted where an image is decoded."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest

from models.judges import classifier
from models.judges.fit import Recipe, drawn_rows, fit
from models.judges.judge import load_judge
from models.pipeline import load_pipeline
from tasks import codec as codecs
from tasks import judge as judging
from tasks.codecs import autoencoder
from tasks.editing import subjects
from tasks.evaluation import scorer as scoring
from tasks.evaluation.extraction import Images
from tasks.evaluation.protocol import NotComparableError, declare
from tasks.evaluation.scorer import Scorer
from tasks.params import AutoencoderParams, CodecParams, EditParams, EvaluateParams
from tasks.params.codec import TextParams
from tasks.pictures import decoding, images, samples, spooled
from tests.support import judge_inputs
from tests.support.data_inputs import contents

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
    some = images.load_pixels(folder, "train", judge_inputs.IMAGE, lambda split: wanted)
    assert len(decoded) == 3 and some.pixels.shape == (3, 1, 8, 8)
    assert np.array_equal(some.at(wanted), whole.pixels[wanted])
    assert (list(some.keys), list(some.captions)) == (list(whole.keys), list(whole.captions))
    assert np.array_equal(some.labels, whole.labels)
    for missing in (8, 300):
        with pytest.raises(ValueError, match="pixels are asked for that were not read"):
            some.at(np.array([7, missing]))


def test_no_chosen_row_decodes_nothing(judged, decoded):
    none = images.load_pixels(judged / "data" / "images", "train", judge_inputs.IMAGE, lambda split: np.arange(0))
    assert decoded == [] and len(none.pixels) == 0 and len(none.keys) > 300
    assert len(none.at(np.arange(0))) == 0


def test_row_groups_without_a_chosen_row_are_not_read(judged, monkeypatch):
    read = []
    original = images.pq.ParquetFile.iter_batches

    def noted(self, *arguments, **options):
        if "row_groups" in options:  # images; the other columns are read without
            read.append(options["row_groups"])
        return original(self, *arguments, **options)

    monkeypatch.setattr(images.pq.ParquetFile, "iter_batches", noted)
    images.load_pixels(judged / "data" / "images", "train", judge_inputs.IMAGE, lambda split: np.arange(0))
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
    monkeypatch.setattr(Scorer, "_needed", lambda self, split: np.arange(len(split.keys)))
    whole = Scorer(folder, judge, declared)
    drawn = Images.of(whole.train.pixels[:12].copy())
    for block in range(3):
        assert np.array_equal(few.stand_ins(block).pixels, whole.stand_ins(block).pixels)
    assert np.array_equal(few.searched.features, whole.searched.features)
    for label in range(3):
        assert few.class_distance(drawn, label) == whole.class_distance(drawn, label)
    assert np.array_equal(few.nearest_training(drawn), whole.nearest_training(drawn))


# The judge


@pytest.mark.parametrize("labels", [True, False], ids=["classifier and CLIP", "CLIP"])
def test_the_judge_reads_the_images_that_its_trainings_draw_and_is_the_same(tmp_path, decoded, monkeypatch, labels):
    judge_inputs.write_images(tmp_path, labels=labels)
    brief = judge_inputs.PARAMS.model_copy(update={"classifier_steps": 2, "clip_steps": 3, "batch_size": 16})
    few = contents(judge_inputs.run_judge(tmp_path, brief))
    held_out = 134
    assert len(decoded) == held_out + 3 * 16
    decoded.clear()
    monkeypatch.setattr(judging, "_drawn_rows", lambda split, params: np.arange(len(split.keys)))
    assert contents(judge_inputs.run_judge(tmp_path, brief)) == few
    assert len(decoded) > held_out + 300


def test_an_encoder_alone_reads_what_it_draws(tmp_path, decoded):
    judge_inputs.write_images(tmp_path, labels=False, captions=None)
    judge_inputs.run_judge(tmp_path, judge_inputs.BRIEF)
    assert len(decoded) == 134 + 32


def test_a_judge_that_trains_nothing_reads_no_training_image(judged, monkeypatch):
    split = images.load_pixels(judged / "data" / "images", "train", judge_inputs.IMAGE, lambda split: np.arange(0))
    monkeypatch.setattr(judging, "_trained", lambda split, params: [])
    assert len(judging._drawn_rows(split, judge_inputs.BRIEF)) == 0


@pytest.mark.parametrize(("count", "steps"), [(10, 1), (10, 2), (10, 3), (1000, 20), (3, 2)])
def test_the_rows_that_a_training_draws_are_known_before(count, steps):
    seen, network = set(), classifier.Classifier(1, 8, 2)
    weight = network.head.weight

    def loss(rows, generator):
        seen.update(rows.tolist())
        return weight.sum()

    recipe = Recipe(steps, batch_size=4, seed=7)
    fit(network, loss, count, recipe)
    assert drawn_rows(count, recipe).tolist() == sorted(seen)


# The codec


@pytest.mark.parametrize("second", [None, 64], ids=["one text encoder", "two"])
def test_the_codec_reads_the_images_that_its_trainings_draw_and_is_the_same(
    judged, tmp_path, decoded, monkeypatch, second
):
    monkeypatch.setattr(autoencoder, "SCALING_IMAGES", 20)
    monkeypatch.setattr(autoencoder, "QUALITY_IMAGES", 30)
    params = CodecParams(
        kind="autoencoder",
        conditioning="text",
        autoencoder=AutoencoderParams(widths=(8, 16), latent_channels=2, steps=3, batch_size=8),
        text=TextParams(width=16, second_width=second, layers=1, length=16, words=600, steps=1),
    )

    def made(name):
        folder = judged / "data" / "images"
        codecs.codec(folder, judged / "data" / "accepted.json", tmp_path / name, params, judge_inputs.IMAGE)
        return contents(tmp_path / name)

    few = made("few")
    training = len(decoded) - 134
    assert 64 < training <= 20 + 24 + 64 * (2 if second else 1) < 300
    decoded.clear()
    monkeypatch.setattr(codecs, "_training_rows", lambda split, params: np.arange(len(split.keys)))
    assert made("whole") == few
    whole = len(decoded) - 134
    assert whole > 300
    decoded.clear()
    monkeypatch.setattr(samples, "HELD_OUT", 40)
    made("fewer")
    assert 40 < len(decoded) - whole < 40 + 30


# At most so many held-out images


@pytest.fixture
def fewer(monkeypatch):
    """At most 40 held-out images, of 134."""
    monkeypatch.setattr(samples, "HELD_OUT", 40)


def test_the_judge_is_tested_on_at_most_so_many_images(judged, tmp_path, decoded, fewer):
    (tmp_path / "data").symlink_to(judged / "data")
    judge_inputs.run_judge(tmp_path, judge_inputs.BRIEF)
    assert len(decoded) == 40 + 32
    assert load_judge(tmp_path / "judge").info.held_out_images == 40


def test_the_scorer_compares_with_at_most_so_many_images_and_the_fingerprint_says_so(
    judged, tmp_path, decoded, request
):
    judge_inputs.write_pipeline(tmp_path)
    folder, judge = judged / "data" / "images", load_judge(judged / "judge")
    model = load_pipeline(tmp_path / "outputs" / "pipeline")
    whole = declare(model, folder, judge, PARAMS)
    assert whole.measurement.reference.images == 134
    request.getfixturevalue("fewer")
    declared = declare(model, folder, judge, PARAMS)
    assert declared.measurement.reference.images == 40 and declared.fingerprint != whole.fingerprint
    decoded.clear()
    scorer = Scorer(folder, judge, declared)
    assert len(decoded) == 40 + len(scorer.train.keys)
    assert len(scorer.reference) == len(scorer.held_out.keys) == len(scorer.held_out.captions) == 40
    assert sorted(Counter(scorer.held_out.labels.tolist()).values()) == [13, 13, 14]
    assert "12 samples and 40 held-out images" in scorer.small_n()
    shown, conditions = scorer.held_out_for("label", 5)
    every = images.load_pixels(folder, "test", judge_inputs.IMAGE)
    for pixels, label in zip(shown, conditions["labels"], strict=True):
        assert (every.pixels[every.labels == label] == pixels).all((1, 2, 3)).any()
    with pytest.raises(NotComparableError, match="the images are not those of the protocol"):
        Scorer(folder, judge, whole)


def test_edit_reads_at_most_so_many_held_out_images(judged, tmp_path, decoded, fewer):
    judge_inputs.write_pipeline(tmp_path)
    model = load_pipeline(tmp_path / "outputs" / "pipeline")
    train = len(images.load_pixels(judged / "data" / "images", "train", judge_inputs.IMAGE).keys)
    decoded.clear()
    chosen = subjects.choose(judged / "data" / "images", model, EditParams(n_images=10))
    assert len(decoded) == 40 + train
    assert (len(chosen.pixels), len(chosen.reference), len(chosen.own["labels"])) == (10, 30, 10)


def test_a_stratified_choice_follows_the_labels_and_leaves_none_out():
    labels = np.repeat([-1, 0, 1, 2], [100, 897, 2, 1])
    chosen = samples.stratified(labels, 100)
    assert (np.diff(chosen) > 0).all() and len(chosen) == 100
    found = Counter(labels[chosen].tolist())
    assert found[1] in (1, 2) and found[2] == 1 and abs(found[0] - 89) <= 1 and abs(found[-1] - 10) <= 1
    assert np.array_equal(samples.stratified(labels, 100), chosen)
    assert not np.array_equal(samples.stratified(labels, 100, seed=1), chosen)
    assert np.array_equal(samples.stratified(labels, 1000), np.arange(1000))
    assert len(samples.stratified(labels, 2)) == 2 and len(samples.stratified(labels[:0], 5)) == 0
    assert 0.4 < samples.stratified(np.full(1000, -1), 500).mean() / 1000 < 0.6


def test_captions_and_keys_stay_in_a_file(judged, monkeypatch):
    monkeypatch.setattr(spooled, "BATCH_ROWS", 7)
    whole = images.load_pixels(judged / "data" / "images", "train", judge_inputs.IMAGE, lambda split: np.arange(0))
    assert isinstance(whole.captions, spooled.Column) and isinstance(whole.keys, spooled.Column)
    label = int(whole.labels[np.int64(7)])
    assert whole.captions[np.int64(7)] == judge_inputs.template_captions(label)
    assert list(whole.keys) == sorted(whole.keys) and whole.keys[-1] == list(whole.keys)[-1]
    assert whole.captions[::100] == list(whole.captions)[::100]
    assert whole.keys[5:30] == list(whole.keys)[5:30] and whole.keys[30:5] == []
    assert len(list(whole.captions)) == len(whole.captions) > 300
    assert np.array_equal(whole.with_condition("text"), np.arange(len(whole.keys)))
