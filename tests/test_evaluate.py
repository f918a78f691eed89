"""Measuring by a declared protocol: known answers, what may be compared, what does not apply, the stage's files."""

import csv
import json
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import PIL.Image
import pytest

from models.judge import load_judge
from models.pipeline import Pipeline, from_uint8, load_pipeline, to_uint8
from tasks import measures, protocol
from tasks.evaluate import evaluate, picture
from tasks.images import load_pixels
from tasks.params import EvaluateParams
from tests import judge_inputs
from tests.data_inputs import contents

PARAMS = EvaluateParams(
    sampler="dpm_solver_pp_2m",
    steps=3,
    n_distance=150,
    n_accuracy=60,
    n_compare=80,
    n_ddpm=7,
    guidance_scale=2.0,
    seed_blocks=2,
    batch_size=64,
    seed=5,
)


@dataclass(frozen=True)
class Copyist(Pipeline):
    """A perfect model: it draws training images of the class that it is asked for."""

    images: object = None

    def sample(self, seeds, labels=None, *_, **__):
        rows = [np.flatnonzero(self.images.labels == label) for label in range(len(self.classes))]
        chosen = [rows[label][seed % len(rows[label])] for seed, label in zip(seeds, labels, strict=True)]
        return from_uint8(self.images.pixels[chosen])


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Labelled and captioned digits, their judge, and a pipeline of random weights; read it only."""
    root = tmp_path_factory.mktemp("tree")
    judge_inputs.write_images(root)
    judge_inputs.run_judge(root)
    judge_inputs.write_pipeline(root)
    return root


@pytest.fixture(scope="module")
def pipeline(tree):
    return load_pipeline(tree / "outputs" / "pipeline")


@pytest.fixture(scope="module")
def judge(tree):
    return load_judge(tree / "judge")


@pytest.fixture(scope="module")
def evaluated(tree, tmp_path_factory):
    """What the stage wrote about the pipeline of random weights."""
    return run(tree, tmp_path_factory.mktemp("evaluated"))


def run(tree, out):
    evaluate(
        tree / "outputs" / "pipeline",
        tree / "data" / "images",
        tree / "data" / "accepted.json",
        tree / "judge",
        out / "metrics.json",
        out / "evaluation",
        out / "timing" / "evaluate.json",
        PARAMS if load_pipeline(tree / "outputs" / "pipeline").conditioning != "none" else unguided(PARAMS),
    )
    return out


def unguided(params):
    return params.model_copy(update={"guidance_scale": 1.0})


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# Known answers


def test_a_model_that_draws_training_images_is_as_good_as_the_floor_and_the_real_ones(tree, pipeline, judge):
    images = tree / "data" / "images"
    perfect = Copyist(
        pipeline.unet, pipeline.betas, pipeline.info, images=load_pixels(images, "train", judge_inputs.IMAGE)
    )
    measured = protocol.measure(perfect, images, judge, protocol.declare(perfect, images, judge, PARAMS))
    assert measured["frechet_distance_floor"] > 0
    assert measured["frechet_distance"] < 3 * measured["frechet_distance_floor"]
    assert measured["label_accuracy"] >= 0.97
    assert measured["label_accuracy_real"] >= 0.95
    assert measured["clip_score"] == pytest.approx(measured["clip_score_real"], rel=0.05)
    assert measured["inception_style_score"] == pytest.approx(measured["inception_style_score_real"], rel=0.1)
    assert measured["not_applicable"] == {}


def test_a_model_of_random_weights_is_far_from_the_floor(evaluated):
    measured = read(evaluated / "metrics.json")
    assert measured["frechet_distance"] > 10 * measured["frechet_distance_floor"]
    assert measured["kid"] > measured["kid_floor"]
    assert measured["label_accuracy"] < 0.8
    assert measured["clip_score"] < measured["clip_score_real"]


def test_means_and_spreads_are_those_of_the_seed_blocks(tree, pipeline, judge):
    images = tree / "data" / "images"
    declared = protocol.declare(pipeline, images, judge, PARAMS)
    measured = protocol.measure(pipeline, images, judge, declared)
    scorer = protocol.Scorer(images, judge, declared)
    labels = [index % 3 for index in range(PARAMS.n_distance)]
    values = []
    for block in range(2):
        seeds = range(5 + block * 1_000_000, 5 + block * 1_000_000 + PARAMS.n_distance)
        drawn = to_uint8(pipeline.sample(seeds, labels, "dpm_solver_pp_2m", 3))
        values.append(scorer.distances(drawn)["frechet_distance"])
    assert measured["frechet_distance"] == pytest.approx(np.mean(values), rel=1e-3)  # other batches round otherwise
    assert measured["frechet_distance_spread"] == pytest.approx(abs(values[0] - values[1]) / np.sqrt(2), rel=0.05)


def test_the_floor_is_taken_from_as_many_training_images_of_the_same_classes(tree, pipeline, judge):
    images = tree / "data" / "images"
    scorer = protocol.Scorer(images, judge, protocol.declare(pipeline, images, judge, PARAMS))
    stand_ins = scorer.stand_ins(0)
    train = load_pixels(images, "train", judge_inputs.IMAGE)
    label_of = {pixels.tobytes(): label for pixels, label in zip(train.pixels, train.labels.tolist(), strict=True)}
    assert sorted(label_of[pixels.tobytes()] for pixels in stand_ins) == [0] * 50 + [1] * 50 + [2] * 50
    assert len({pixels.tobytes() for pixels in stand_ins}) == 150
    assert {pixels.tobytes() for pixels in scorer.stand_ins(1)} != {pixels.tobytes() for pixels in stand_ins}
    many = protocol.declare(pipeline, images, judge, PARAMS.model_copy(update={"n_distance": 10_000}))
    assert len(protocol.Scorer(images, judge, many).stand_ins(0)) == len(train.keys)


# What may be compared


def test_the_fingerprint_names_the_measurement_and_not_the_sampling(tree, pipeline, judge):
    def of(**changes):
        params = PARAMS.model_copy(update=changes)
        return protocol.declare(pipeline, tree / "data" / "images", judge, params)["fingerprint"]

    same = {"sampler": "ddim", "steps": 7, "guidance_scale": 4.0, "batch_size": 3, "n_compare": 9, "n_ddpm": 2}
    assert {of(**{name: value}) for name, value in same.items()} == {of()}
    other = {"n_distance": 151, "n_accuracy": 61, "seed_blocks": 3, "seed": 6}
    assert len({of(), *(of(**{name: value}) for name, value in other.items())}) == 1 + len(other)


def test_the_fingerprint_names_judge_images_and_labels(tree, pipeline, judge, tmp_path):
    def of(model, images, scale):
        return protocol.declare(model, images, scale, PARAMS)["fingerprint"]

    images = tree / "data" / "images"
    hashes = judge.info["hashes"] | {"clip": "0" * 64}
    other_judge = replace(judge, info=judge.info | {"hashes": hashes})
    other_images = judge_inputs.write_images(tmp_path, captions=lambda label: [f"number {label}"])
    other_model = replace(pipeline, info=pipeline.info | {"classes": ["a", "b", "c"]})
    found = {of(pipeline, images, judge), of(pipeline, images, other_judge)}
    found |= {of(pipeline, other_images, judge), of(other_model, images, judge)}
    assert len(found) == 4


def test_a_champion_is_measured_by_the_protocol_that_its_challenger_left(tree, evaluated, judge, tmp_path):
    declared = read(evaluated / "evaluation" / "protocol.json")
    champion = load_pipeline(judge_inputs.write_pipeline(tmp_path))
    assert protocol.measure(champion, tree / "data" / "images", judge, declared) == read(evaluated / "metrics.json")


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        ({"classes": ["zero", "one"]}, "other classes"),
        ({"conditioning": "none"}, "other classes"),
        ({"size": 16}, "1 x 16 x 16 images and the protocol measures 1 x 8 x 8"),
    ],
)
def test_a_champion_that_draws_something_else_cannot_be_measured_alike(tree, pipeline, judge, info, reason):
    images = tree / "data" / "images"
    declared = protocol.declare(pipeline, images, judge, PARAMS)
    with pytest.raises(protocol.NotComparableError, match=reason):
        protocol.measure(replace(pipeline, info=pipeline.info | info), images, judge, declared)


def test_neither_another_judge_nor_other_images_serve_a_protocol(tree, pipeline, judge, tmp_path):
    images = tree / "data" / "images"
    declared = protocol.declare(pipeline, images, judge, PARAMS)
    with pytest.raises(protocol.NotComparableError, match="judge is not the one"):
        protocol.measure(pipeline, images, replace(judge, info=judge.info | {"hashes": {}}), declared)
    other = judge_inputs.write_images(tmp_path, captions=None)
    with pytest.raises(protocol.NotComparableError, match="images are not those"):
        protocol.measure(pipeline, other, judge, declared)


# What does not apply


def test_an_unconditional_model_has_no_label_accuracy_and_no_clip_score(tree, tmp_path):
    for name in ("data", "judge"):
        (tmp_path / name).symlink_to(tree / name)
    judge_inputs.write_pipeline(tmp_path, classes=[])
    run(tmp_path, tmp_path / "out")
    measured = read(tmp_path / "out" / "metrics.json")
    assert set(measured["not_applicable"]) == {"label_accuracy", "clip_score"}
    assert not {name for name in measured if name.startswith(("label_accuracy", "clip_score"))}
    assert measured["n_samples_accuracy"] == 0
    assert measures.names(measured) == ["frechet_distance", "inception_style_score", "kid"]
    pictures = {path.name for path in (tmp_path / "out" / "evaluation").glob("*.png")}
    assert pictures == {"grid_unguided.png", "grid_ddpm.png"}


def test_images_without_labels_and_captions_have_distances_alone(tmp_path):
    judge_inputs.write_images(tmp_path, labels=False, captions=None)
    judge_inputs.run_judge(tmp_path)
    judge_inputs.write_pipeline(tmp_path, classes=[])
    measured = read(run(tmp_path, tmp_path / "out") / "metrics.json")
    assert measures.names(measured) == ["frechet_distance", "kid"]
    assert set(measured["not_applicable"]) == {"inception_style_score", "label_accuracy", "clip_score"}
    assert measured["extractor"] == "self_supervised"


@pytest.mark.parametrize(
    ("captions", "reason"),
    [(None, "no captions"), (lambda label: [["a round one", "one stroke", "a swan"][label], "a digit"], None)],
    ids=["no captions", "captions"],
)
def test_clip_score_needs_captions(tmp_path, captions, reason):
    images = judge_inputs.write_images(tmp_path, captions=captions)
    judge = load_judge(judge_inputs.run_judge(tmp_path))
    pipeline = load_pipeline(judge_inputs.write_pipeline(tmp_path))
    measured = protocol.measure(pipeline, images, judge, protocol.declare(pipeline, images, judge, PARAMS))
    assert ("clip_score" in measured) == (reason is None)
    assert reason is None or reason in measured["not_applicable"]["clip_score"]


# The files of the stage


def test_metrics_are_flat_and_complete(evaluated):
    measured = read(evaluated / "metrics.json")
    means = {"frechet_distance", "kid", "inception_style_score", "clip_score", "label_accuracy"}
    spreads = {f"{name}_spread" for name in means}
    floors = {f"{name}_floor{part}" for name in ("frechet_distance", "kid") for part in ("", "_spread")}
    real = {f"{name}_real" for name in ("inception_style_score", "clip_score", "label_accuracy")}
    counts = {"n_samples", "n_samples_accuracy", "n_reference", "n_floor", "seed_blocks", "steps"}
    assert set(measured) == means | spreads | floors | real | counts | {
        "not_applicable",
        "extractor",
        "fingerprint",
        "sampler",
        "guidance_scale",
    }
    assert all(np.isfinite(measured[name]) for name in means | spreads | floors | real)
    assert (measured["n_samples"], measured["n_samples_accuracy"], measured["n_floor"]) == (150, 60, 150)
    assert measured["fingerprint"] == read(evaluated / "evaluation" / "protocol.json")["fingerprint"]


def test_the_table_compares_samplers_at_equal_numbers_and_leaves_out_what_misleads(evaluated):
    rows = table(evaluated / "evaluation" / "samplers.csv")
    assert [(row["sampler"], row["steps"], row["guidance_scale"], row["n"], row["seed_blocks"]) for row in rows] == [
        ("dpm_solver_pp_2m", "3", "1.0", "150", "2"),
        ("dpm_solver_pp_2m", "3", "2.0", "60", "2"),
        ("dpm_solver_pp_2m", "3", "1.0", "80", "1"),
        ("ddim", "30", "1.0", "80", "1"),
        ("ddpm", "30", "1.0", "7", "1"),
    ]
    measured = read(evaluated / "metrics.json")
    assert float(rows[0]["frechet_distance"]) == pytest.approx(measured["frechet_distance"], rel=1e-5)
    assert float(rows[1]["label_accuracy"]) == pytest.approx(measured["label_accuracy"], rel=1e-5)
    small = [row for row in rows if int(row["n"]) < 2 * 32]
    assert [row["frechet_distance"] + row["kid"] + row["inception_style_score"] for row in small] == ["", ""]
    assert {row["note"] for row in small} == {"too few images for distances (64 needed)"}
    assert all(row["label_accuracy"] and row["clip_score"] for row in rows)


def test_grids_show_one_titled_column_per_class(evaluated, pipeline):
    with PIL.Image.open(evaluated / "evaluation" / "grid_guided.png") as grid:
        assert grid.width == 3 * 80 + 2 * 2
        assert grid.height > 10 * 80 + 9 * 2  # the titles stand above
    labels = [0, 1, 2, 0]
    drawn = protocol.Draw("ddim", 1, 1.0, labels, np.zeros((4, 1, 8, 8), np.uint8), 0.0)
    assert picture(drawn, judge_inputs.CLASSES).height < 2 * 80  # an incomplete row is left out
    assert picture(drawn.first(2), judge_inputs.CLASSES).width > 3 * 80  # too few for a row of all: plain


def test_a_rerun_gives_the_same_bytes_and_only_timing_holds_times(tree, evaluated, tmp_path):
    again = run(tree, tmp_path)
    first, second = contents(evaluated), contents(again)
    assert {name for name in first if first[name] != second[name]} <= {"timing/evaluate.json"}
    seconds = read(again / "timing" / "evaluate.json")["seconds_per_image"]
    assert set(seconds) == {
        "dpm_solver_pp_2m, 3 steps, guidance 1",
        "dpm_solver_pp_2m, 3 steps, guidance 2",
        "ddim, 30 steps, guidance 1",
        "ddpm, 30 steps, guidance 1",
    }
    assert all(value > 0 for value in seconds.values())


def test_dvc_shows_the_metrics(evaluated, tmp_path):
    def dvc(*command):
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *command], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout

    (tmp_path / "metrics.json").write_bytes((evaluated / "metrics.json").read_bytes())
    dvc("init", "--no-scm", "--quiet")
    (tmp_path / "dvc.yaml").write_text("metrics: [metrics.json]\n")
    shown = json.loads(dvc("metrics", "show", "--json"))[""]["data"]["metrics.json"]["data"]
    assert shown | {"not_applicable": {}} == read(evaluated / "metrics.json")
    assert "frechet_distance_floor" in dvc("metrics", "show")
