"""Each image is passed through each network of the judge once: by rows, in the scorers, and in a whole `evaluate`."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from models.judges import metrics
from models.judges.judge import Judge, load_judge
from models.pipeline import load_pipeline
from tasks.evaluate import evaluate
from tasks.evaluation import extraction
from tasks.evaluation.draws import Draw, of_class
from tasks.evaluation.extraction import Extraction, Images, Part
from tasks.evaluation.protocol import declare
from tasks.evaluation.scorer import Scorer
from tasks.formats.prior import FILE as PRIOR
from tasks.formats.prior import Prior
from tasks.params import EvaluateParams
from tasks.subjects.measures import SubjectScorer
from tests.support import judge_inputs

PARAMS = EvaluateParams(
    sampler="ddim",
    steps=2,
    n_distance=120,
    n_accuracy=70,
    n_compare=66,
    n_slowest=5,
    guidance_scale=2.0,
    guidance_sweep=(1.0, 2.0, 3.0),
    n_sweep=66,
    batch_size=64,
    seed=5,
)
NETWORKS = ("features", "class_logits", "clip_image_embeds")


@pytest.fixture
def passed(monkeypatch):
    """How often each image was passed through each network of a judge: method -> image -> count."""
    counts = {name: Counter() for name in NETWORKS}

    def counted(name, real):
        def call(self, pixels):
            counts[name].update(image.tobytes() for image in pixels)
            return real(self, pixels)

        return call

    for name in NETWORKS:
        monkeypatch.setattr(Judge, name, counted(name, getattr(Judge, name)))
    return counts


@pytest.fixture
def tree(judged, tmp_path):
    for name in ("data", "judge"):
        (tmp_path / name).symlink_to(judged / name)
    judge_inputs.write_pipeline(tmp_path)
    Prior().write(tmp_path / "prior" / PRIOR)
    return tmp_path


def scorer_of(tree):
    images, judge = tree / "data" / "images", load_judge(tree / "judge")
    return Scorer(images, judge, declare(load_pipeline(tree / "outputs" / "pipeline"), images, judge, PARAMS))


def run(tree, report):
    evaluate(
        tree / "outputs" / "pipeline",
        tree / "data" / "images",
        tree / "data" / "accepted.json",
        tree / "judge",
        tree / "averages",
        tree / "prior",
        report / "metrics.json",
        report / "evaluation",
        report / "timing.json",
        PARAMS,
    )


def test_a_whole_evaluation_passes_each_image_through_each_network_once(tree, passed, monkeypatch):
    measured = Counter()
    for name in ("frechet_distance", "nearest"):
        real = getattr(metrics, name)

        def noted(features, other, name=name, real=real):
            measured[name, features.tobytes(), other.tobytes()] += 1
            return real(features, other)

        monkeypatch.setattr(metrics, name, noted)
    run(tree, tree / "first")
    assert (tree / "first" / "evaluation" / "classes.csv").is_file()
    assert not passed["class_logits"], "they follow from the features"
    for name in ("features", "clip_image_embeds"):
        assert set(passed[name].values()) == {1}, name
    held_out, train = len(scorer_of(tree).held_out.keys), len(scorer_of(tree).train.keys)
    drawn, guided = 3 * 120, 3 * 70
    others, swept = 5 * 66 + 5, 66  # five other samplers and the slowest; guidance 3
    assert len(passed["features"]) == held_out + train + drawn + guided + others + swept
    assert len(passed["clip_image_embeds"]) == held_out + drawn + guided + others + swept
    assert set(measured.values()) == {1}


def test_a_published_extractor_leaves_the_classes_to_the_classifier(tree, passed, monkeypatch):
    monkeypatch.setattr(Judge, "kind", "pretrained inception")
    scorer = scorer_of(tree)
    drawn = Images.of(np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8), np.uint8))
    some = Images.of(drawn.parts[0].array, np.arange(20))
    for images in (drawn, some):
        scorer.inception_style_score(images)
        scorer.fit_to_labels(images, [0] * len(images))
    for _ in range(2):
        scorer.real()
        assert scorer.distances(drawn).pop("kid")
    assert len(passed["class_logits"]) == 60 + len(scorer.held_out.keys)
    assert set(passed["class_logits"].values()) == {1}


def test_the_measures_of_a_subject_extract_once(judged, passed):
    judge = load_judge(judged / "judge")
    subject, classes = np.random.default_rng(0).integers(0, 256, (2, 40, 1, 8, 8), np.uint8)
    scorer = SubjectScorer(judge, Images.of(subject), Images.of(classes))
    first = Images.of(classes, np.arange(20))
    for _ in range(2):
        scorer.similarity(first)
        scorer.diversity(first)
        scorer.fidelity(first, ["a zero"] * 20)
    assert len(passed["features"]) == 80 and set(passed["features"].values()) == {1}
    assert len(passed["clip_image_embeds"]) == 20 and set(passed["clip_image_embeds"].values()) == {1}


def test_rows_get_the_outputs_of_their_own_images():
    array = np.random.default_rng(0).integers(0, 256, (40, 1, 2, 2), np.uint8)
    other, expected, seen = array[::-1].copy(), array.reshape(40, 4).astype(np.float32), []

    def network(pixels):
        seen.append(len(pixels))
        return pixels.reshape(len(pixels), 4).astype(np.float32)

    known = Extraction()
    for rows, new in (([7, 3, 7], [2]), (range(10), [8]), (range(40), [30]), ([39, 0], [])):
        chosen, before = np.asarray(rows), len(seen)
        assert np.array_equal(known.output("a", network, Images.of(array, chosen)), expected[chosen])
        assert seen[before:] == new
    joined = Images((Part(array, np.array([1])), Part(other, np.array([], int)), Part(other, np.array([0, 2]))))
    assert len(joined) == 3 and np.array_equal(joined.pixels, array[[1, 39, 37]])
    assert np.array_equal(known.output("a", network, joined), expected[[1, 39, 37]])
    known.output("b", network, Images.of(array))
    assert seen[-1] == 40, "another network"


def test_rows_that_follow_each_other_are_not_copied_and_others_in_parts(monkeypatch):
    monkeypatch.setattr(extraction, "COPIED", 3)
    array, seen = np.zeros((20, 1, 2, 2), np.uint8), []

    def network(pixels):
        seen.append((len(pixels), np.shares_memory(pixels, array)))
        return np.zeros((len(pixels), 1), np.float32)

    known = Extraction()
    known.output("a", network, Images.of(array, np.arange(5, 12)))
    known.output("a", network, Images.of(array, np.arange(3, 16)))
    assert seen == [(7, True), (3, False), (3, False)]


def test_an_array_at_the_place_of_one_that_is_gone_is_another():
    known, number = Extraction(), None
    for value in range(100):
        array = np.full((1, 1, 64, 64), value, np.uint8)
        images = Images.of(array)
        assert known.once("sum", lambda images: int(images.pixels.max()), images) == value
        assert known.output("a", lambda pixels: pixels.max((2, 3)), images)[0, 0] == value
        number = number or id(array)
        del array, images


def test_a_result_is_kept_by_name_and_rows():
    array, calls, known = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1), [], Extraction()

    def total(images):
        calls.append(len(images))
        return int(images.pixels.sum())

    def of(name, rows):
        return known.once(name, total, Images.of(array, np.array(rows)))

    assert [of("a", [0, 1]), of("a", [0, 1]), of("a", [1, 2]), of("b", [0, 1])] == [1, 1, 3, 1]
    assert calls == [2, 2, 2]
    with pytest.raises(ValueError, match="unpack"):
        known.once("a", total, Images((*Images.of(array).parts, *Images.of(array).parts)))


def test_the_images_of_a_class_are_those_of_all_draws():
    pixels = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
    whole = Draw(None, [0, 1] * 5, pixels, 2.0)
    first = whole.first(4)
    assert first.seconds == 0.8 and np.array_equal(first.pixels, pixels[:4]) and first.labels == [0, 1, 0, 1]
    assert np.shares_memory(first.pixels, pixels) and first.images.parts[0].array is pixels
    assert of_class([whole, first], 1).pixels.ravel().tolist() == [1, 3, 5, 7, 9, 1, 3]
    assert len(whole.first(20).pixels) == 10 and first.first(2).images.pixels.ravel().tolist() == [0, 1]
