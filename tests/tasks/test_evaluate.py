"""Measuring by a declared protocol: known answers, what may be compared, what does not apply, the stage's files."""

import csv
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import PIL.Image
import pytest

from models.device import emulates_bf16
from models.images.pixels import from_uint8, to_uint8
from models.judges.judge import load_judge
from models.networks import compilation
from models.noise import schedules
from models.noise.samplers import Sampling
from models.pipeline import Pipeline, load_pipeline, save_pipeline
from tasks.evaluate import evaluate, grid_of
from tasks.evaluation import draws
from tasks.evaluation.extraction import Images
from tasks.evaluation.protocol import NotComparableError, Protocol, declare
from tasks.evaluation.scorer import Scorer
from tasks.evaluation.summary import measure
from tasks.formats.prior import FILE as PRIOR
from tasks.formats.prior import Prior
from tasks.params import EvaluateParams
from tasks.pictures.images import load_pixels
from tasks.runtime import measures
from tasks.runtime.errors import StageError
from tests.support import judge_inputs
from tests.support.data_inputs import contents

PARAMS = EvaluateParams(
    sampler="dpm_solver_pp_2m",
    steps=3,
    n_distance=150,
    n_accuracy=60,
    n_compare=80,
    n_slowest=7,
    guidance_scale=2.0,
    seed_blocks=3,
    guidance_sweep=(1.0, 2.0, 4.0),
    n_sweep=70,
    batch_size=64,
    seed=5,
)
BRIEF = PARAMS.model_copy(update={"n_compare": 2, "n_slowest": 2, "guidance_sweep": ()})
"""The same measurement, almost without comparisons."""


@dataclass(frozen=True)
class Copyist(Pipeline):
    """A perfect model: it draws training images of the class that it is asked for."""

    images: object = None

    def sample(self, seeds, labels=None, *_, **__):
        rows = [np.flatnonzero(self.images.labels == label) for label in range(len(self.info.classes))]
        chosen = [rows[label][seed % len(rows[label])] for seed, label in zip(seeds, labels, strict=True)]
        return from_uint8(self.images.pixels[chosen])


@pytest.fixture(scope="module")
def tree(tmp_path_factory, judged):
    """Labelled and captioned digits, their judge, and a pipeline of random weights; read it only."""
    root = tmp_path_factory.mktemp("tree")
    for name in ("data", "judge"):
        (root / name).symlink_to(judged / name)
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


def run(tree, out, params=PARAMS):
    Prior().write(out / "prior" / PRIOR)
    evaluate(
        tree / "outputs" / "pipeline",
        tree / "data" / "images",
        tree / "data" / "accepted.json",
        tree / "judge",
        tree / "averages",
        out / "prior",
        out / "metrics.json",
        out / "evaluation",
        out / "timing" / "evaluate.json",
        params if load_pipeline(tree / "outputs" / "pipeline").info.conditioning != "none" else unguided(params),
    )
    return out


def unguided(params):
    return params.model_copy(update={"guidance_scale": 1.0, "guidance_sweep": ()})


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def measured_in(out):
    return measures.read(out / "evaluation" / measures.FILE)


def table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# Known answers


def test_a_model_that_draws_training_images_is_as_good_as_the_floor_and_the_real_ones(tree, pipeline, judge):
    images = tree / "data" / "images"
    perfect = Copyist(
        pipeline.network,
        pipeline.scheduler,
        pipeline.info,
        images=load_pixels(images, "train", judge_inputs.IMAGE),
    )
    measured = measure(perfect, images, judge, declare(perfect, images, judge, PARAMS))
    found = measured.measures
    assert found["frechet_distance"].floor > 0
    for name in ("frechet_distance", "cmmd"):
        assert found[name].value < 3 * found[name].floor
    assert found["label_accuracy"].value >= 0.97
    assert found["label_accuracy"].real >= 0.95
    assert found["clip_score"].value == pytest.approx(found["clip_score"].real, rel=0.05)
    assert found["inception_style_score"].value == pytest.approx(found["inception_style_score"].real, rel=0.1)
    assert measured.not_applicable == {}


def test_a_model_of_random_weights_is_far_from_the_floor(evaluated):
    found = measured_in(evaluated).measures
    assert found["frechet_distance"].value > 10 * found["frechet_distance"].floor
    assert found["kid"].value > found["kid"].floor
    assert found["cmmd"].value > 10 * found["cmmd"].floor > 0
    assert found["label_accuracy"].value < 0.8
    assert found["clip_score"].value < found["clip_score"].real


def test_means_and_spreads_are_those_of_the_seed_blocks(tree, pipeline, judge):
    images = tree / "data" / "images"
    declared = declare(pipeline, images, judge, PARAMS)
    measured = measure(pipeline, images, judge, declared)
    scorer = Scorer(images, judge, declared)
    labels = [index % 3 for index in range(PARAMS.n_distance)]
    values = []
    for block in range(3):
        seeds = range(5 + block * 1_000_000, 5 + block * 1_000_000 + PARAMS.n_distance)
        drawn = to_uint8(pipeline.sample(seeds, labels, Sampling("dpm_solver_pp_2m", 3)))
        values.append(scorer.distances(Images.of(drawn))["frechet_distance"])
    found = measured.measures["frechet_distance"]
    assert found.value == pytest.approx(np.mean(values), rel=1e-3)  # other batches round otherwise
    assert found.spread == pytest.approx(np.std(values, ddof=1), rel=0.05)


def test_the_floor_is_taken_from_as_many_training_images_of_the_same_classes(tree, pipeline, judge):
    images = tree / "data" / "images"
    scorer = Scorer(images, judge, declare(pipeline, images, judge, PARAMS))
    stand_ins = scorer.stand_ins(0).pixels
    train = load_pixels(images, "train", judge_inputs.IMAGE)
    label_of = {pixels.tobytes(): label for pixels, label in zip(train.pixels, train.labels.tolist(), strict=True)}
    assert sorted(label_of[pixels.tobytes()] for pixels in stand_ins) == [0] * 50 + [1] * 50 + [2] * 50
    assert len({pixels.tobytes() for pixels in stand_ins}) == 150
    assert {pixels.tobytes() for pixels in scorer.stand_ins(1).pixels} != {pixels.tobytes() for pixels in stand_ins}
    many = declare(pipeline, images, judge, PARAMS.model_copy(update={"n_distance": 10_000}))
    assert len(Scorer(images, judge, many).stand_ins(0)) == len(train.keys)


# Precision


@pytest.mark.skipif(emulates_bf16("cpu"), reason="takes long where bfloat16 is emulated")
def test_a_lower_precision_is_a_column_and_is_compared_with_float32(tree, evaluated, tmp_path, capsys):
    out = run(tree, tmp_path, BRIEF.model_copy(update={"precision": "bf16"}))
    lower, full = measured_in(out), measured_in(evaluated)
    assert lower.fingerprint == full.fingerprint
    assert lower.precision == "bf16" and full.precision is full.precision_parity is None
    parity = lower.precision_parity
    assert parity.n == 8 and 20 < parity.worst_psnr_db <= parity.psnr_db < 100
    assert f"precision bf16 agrees with float32 to {parity.psnr_db:.1f} dB" in capsys.readouterr().out
    for name in ("frechet_distance", "label_accuracy"):
        assert lower.measures[name].value == pytest.approx(full.measures[name].value, rel=0.1)
        assert lower.measures[name].value != full.measures[name].value or name == "label_accuracy"
    rows, plain = table(out / "evaluation" / "samplers.csv"), table(evaluated / "evaluation" / "samplers.csv")
    assert {row["network_precision"] for row in rows} == {"bf16"} and "network_precision" not in plain[0]
    declared = Protocol.read(out / "evaluation" / "protocol.json")
    assert declared.precision == "bf16" and "precision" not in read(evaluated / "evaluation" / "protocol.json")
    again = measure(
        load_pipeline(tree / "outputs" / "pipeline"), tree / "data" / "images", load_judge(tree / "judge"), declared
    )
    assert again.measures == lower.measures, "what draws by the protocol draws in its precision"


@pytest.mark.gpu
def test_bf16_on_a_gpu_agrees_with_float32_and_repeats(tree, tmp_path):
    """In NHWC there; on a machine without a GPU the same runs on its CPU."""
    first, second = (
        measured_in(run(tree, tmp_path / where, PARAMS.model_copy(update={"precision": "bf16"}))) for where in "ab"
    )
    assert 20 < first.precision_parity.worst_psnr_db < 100
    for name, measure_ in first.measures.items():
        assert second.measures[name].value == pytest.approx(measure_.value, rel=0.02), name


def test_fp16_needs_a_gpu(tree, tmp_path, monkeypatch):
    monkeypatch.setattr("models.device.best_device", lambda: "cpu")
    with pytest.raises(StageError, match="'fp16' needs a GPU; use 'bf16' or 'no'"):
        run(tree, tmp_path, PARAMS.model_copy(update={"precision": "fp16"}))


# Compilation


@pytest.fixture
def traced(monkeypatch):
    """Compile without generating code, which takes minutes on a CPU; return dynamo's counts."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    monkeypatch.setattr(compilation, "compiled_pipeline", partial(compilation.compiled_pipeline, backend="eager"))
    torch.compiler.reset()
    counters.clear()
    yield counters["stats"]
    torch.compiler.reset()


def test_compilation_is_a_column_and_is_compared_with_the_uncompiled_network(
    tree, evaluated, traced, tmp_path, capsys, monkeypatch
):
    drawn = []
    monkeypatch.setattr(
        draws, "draw_blocks", lambda *args, draw=draws.draw_blocks: (drawn.append(dict(traced)), draw(*args))[1]
    )
    out = run(tree, tmp_path, BRIEF.model_copy(update={"compile": True}))
    compiled, plain = measured_in(out), measured_in(evaluated)
    assert compiled.fingerprint == plain.fingerprint
    assert compiled.compiled and compiled.compile_parity.worst_psnr_db > 60 and compiled.precision_parity is None
    assert plain.compiled is plain.compile_parity is None
    assert "the compiled network agrees with the uncompiled one to" in capsys.readouterr().out
    for name in ("frechet_distance", "label_accuracy"):
        assert compiled.measures[name].value == pytest.approx(plain.measures[name].value, rel=1e-3)
    rows, others = table(out / "evaluation" / "samplers.csv"), table(evaluated / "evaluation" / "samplers.csv")
    assert {row["network_compiled"] for row in rows} == {"yes"} and "network_compiled" not in others[0]
    assert list(rows[0])[-1] == "note"
    assert traced["unique_graphs"] == drawn[0]["unique_graphs"] > 0, "all were compiled before the first timed draw"
    declared = Protocol.read(out / "evaluation" / "protocol.json")
    assert declared.compile is True and "compile" not in read(evaluated / "evaluation" / "protocol.json")
    again = measure(
        load_pipeline(tree / "outputs" / "pipeline"), tree / "data" / "images", load_judge(tree / "judge"), declared
    )
    assert again.compiled and again.measures == compiled.measures, "what draws by the protocol compiles as well"


def test_gpu_compiles_nothing_on_a_cpu(tree, evaluated, traced, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = run(tree, tmp_path, BRIEF.model_copy(update={"compile": "gpu"}))
    assert measured_in(out) == measured_in(evaluated) and not traced["unique_graphs"]


def test_compilation_needs_a_compiler(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "has_compiler", lambda: False)
    with pytest.raises(StageError, match=r"evaluate\.compile needs a C\+\+ compiler"):
        run(tree, tmp_path, PARAMS.model_copy(update={"compile": True}))


# What may be compared


def test_the_fingerprint_names_the_measurement_and_not_the_sampling(tree, pipeline, judge):
    def of(**changes):
        params = PARAMS.model_copy(update=changes)
        return declare(pipeline, tree / "data" / "images", judge, params).fingerprint

    same = {"sampler": "ddim", "steps": 7, "guidance_scale": 4.0, "batch_size": 3, "n_compare": 9, "n_slowest": 2}
    same |= {"guidance_sweep": (3.0,), "n_sweep": 8, "allow_small_n": True, "precision": "bf16", "compile": "gpu"}
    assert {of(**{name: value}) for name, value in same.items()} == {of()}
    other = {"n_distance": 151, "n_accuracy": 61, "seed_blocks": 4, "seed": 6}
    assert len({of(), *(of(**{name: value}) for name, value in other.items())}) == 1 + len(other)


def test_the_fingerprint_names_judge_images_and_labels(tree, pipeline, judge, tmp_path):
    def of(model, images, scale):
        return declare(model, images, scale, PARAMS).fingerprint

    images = tree / "data" / "images"
    hashes = judge.info.hashes | {"clip": "0" * 64}
    other_judge = replace(judge, info=replace(judge.info, hashes=hashes))
    other_images = judge_inputs.write_images(tmp_path, captions=lambda label: [f"number {label}"])
    other_model = replace(pipeline, info=replace(pipeline.info, classes=["a", "b", "c"]))
    found = {of(pipeline, images, judge), of(pipeline, images, other_judge)}
    found |= {of(pipeline, other_images, judge), of(other_model, images, judge)}
    assert len(found) == 4


def test_a_champion_is_measured_by_the_protocol_that_its_challenger_left(tree, evaluated, judge, tmp_path):
    declared = Protocol.read(evaluated / "evaluation" / "protocol.json")
    champion = load_pipeline(judge_inputs.write_pipeline(tmp_path))
    assert measure(champion, tree / "data" / "images", judge, declared) == measured_in(evaluated)


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        ({"classes": ["zero", "one"]}, "different classes"),
        ({"conditioning": "none"}, "different classes"),
        ({"size": 16}, "1 x 16 x 16 images and the protocol measures 1 x 8 x 8"),
    ],
)
def test_a_champion_that_draws_something_else_cannot_be_measured_alike(tree, pipeline, judge, info, reason):
    images = tree / "data" / "images"
    declared = declare(pipeline, images, judge, PARAMS)
    with pytest.raises(NotComparableError, match=reason):
        measure(replace(pipeline, info=replace(pipeline.info, **info)), images, judge, declared)


def test_neither_another_judge_nor_other_images_serve_a_protocol(tree, pipeline, judge, tmp_path):
    images = tree / "data" / "images"
    declared = declare(pipeline, images, judge, PARAMS)
    with pytest.raises(NotComparableError, match="judge is not the one"):
        measure(pipeline, images, replace(judge, info=replace(judge.info, hashes={})), declared)
    other = judge_inputs.write_images(tmp_path, captions=None)
    with pytest.raises(NotComparableError, match="images are not those"):
        measure(pipeline, other, judge, declared)


# What does not apply


def test_an_unconditional_model_has_no_label_accuracy_and_no_clip_score(tree, tmp_path):
    for name in ("data", "judge"):
        (tmp_path / name).symlink_to(tree / name)
    judge_inputs.write_pipeline(tmp_path, classes=[])
    run(tmp_path, tmp_path / "out", BRIEF)
    measured = measured_in(tmp_path / "out")
    assert set(measured.not_applicable) == {"label_accuracy", "clip_score"}
    assert measured.guided_scale is None
    distances = ["cmmd", "frechet_distance", "inception_style_score", "kid", "near_copies", "precision", "recall"]
    assert sorted(measured.measures) == distances
    assert {found.drawn for found in measured.measures.values()} == {"unguided"}
    assert set(read(tmp_path / "out" / "metrics.json")) == {
        "frechet_distance_unguided",
        "frechet_distance_floor",
        "fingerprint",
    }
    assert {path.name for path in (tmp_path / "out" / "evaluation").iterdir()} == {
        "grid_unguided.png",
        "grid_slowest.png",
        "grid_nearest.png",
        "measurements.json",
        "protocol.json",
        "samplers.csv",
        "timesteps.csv",
    }


def test_images_without_labels_and_captions_have_distances_alone(tmp_path):
    judge_inputs.write_images(tmp_path, labels=False, captions=None)
    judge_inputs.run_judge(tmp_path, judge_inputs.BRIEF)
    judge_inputs.write_pipeline(tmp_path, classes=[])
    measured = measured_in(run(tmp_path, tmp_path / "out", BRIEF))
    assert sorted(measured.measures) == ["cmmd", "frechet_distance", "kid", "near_copies", "precision", "recall"]
    assert set(measured.not_applicable) == {"inception_style_score", "label_accuracy", "clip_score"}
    assert measured.extractor == "self_supervised"


@pytest.mark.parametrize(
    ("captions", "reason"),
    [(None, "no captions"), (lambda label: [["a round one", "one stroke", "a swan"][label], "a digit"], None)],
    ids=["no captions", "captions"],
)
def test_clip_score_needs_captions(tmp_path, captions, reason):
    images = judge_inputs.write_images(tmp_path, captions=captions)
    judge = load_judge(judge_inputs.run_judge(tmp_path, judge_inputs.BRIEF))
    pipeline = load_pipeline(judge_inputs.write_pipeline(tmp_path))
    measured = measure(pipeline, images, judge, declare(pipeline, images, judge, PARAMS))
    assert ("clip_score" in measured.measures) == (reason is None)
    assert reason is None or reason in measured.not_applicable["clip_score"]


# The files of the stage


def test_every_number_says_at_which_guidance_it_was_measured(evaluated):
    measured = measured_in(evaluated)
    distances = {"frechet_distance", "kid", "cmmd", "precision", "recall"}
    beside_real = {"inception_style_score", "clip_score", "label_accuracy", "near_copies"}
    guided = {"clip_score", "label_accuracy"}
    assert set(measured.measures) == distances | beside_real
    for name, found in measured.measures.items():
        assert (found.drawn, found.guidance_scale, found.n) == (
            ("guided", 2.0, 60) if name in guided else ("unguided", 1.0, 150)
        )
        assert (found.floor is not None, found.real is not None) == (name in distances, name in beside_real)
    assert all(np.isfinite(value) for value in measured.flat().values())
    assert {"frechet_distance_unguided", "label_accuracy_guided", "kid_floor", "clip_score_real"} < set(measured.flat())
    assert (measured.guided_scale, measured.n_floor, measured.seed_blocks) == (2.0, 150, 3)
    declared = read(evaluated / "evaluation" / "protocol.json")
    assert measured.fingerprint == declared["fingerprint"]
    assert declared["guidance_scales"] == {"unguided": 1.0, "guided": 2.0} and "guidance_scale" not in declared


def test_the_headline_is_short_and_names_the_guidance(evaluated):
    headline, measured = read(evaluated / "metrics.json"), measured_in(evaluated)
    assert headline == {
        "frechet_distance_unguided": measured.measures["frechet_distance"].value,
        "frechet_distance_floor": measured.measures["frechet_distance"].floor,
        "label_accuracy_guided": measured.measures["label_accuracy"].value,
        "clip_score_guided": measured.measures["clip_score"].value,
        "guided_scale": 2.0,
        "guided_kind": "classifier_free",
        "fingerprint": measured.fingerprint[:12],
    }


def test_the_headline_is_a_parameter_that_changes_no_number(tree, evaluated, tmp_path):
    out = run(tree, tmp_path, BRIEF.model_copy(update={"headline": "cmmd"}))
    measured, before = measured_in(out), measured_in(evaluated)
    assert measured == before.model_copy(update={"headline": "cmmd"}), "numbers and fingerprint are the same"
    headline = read(out / "metrics.json")
    assert headline["cmmd_unguided"] == measured.measures["cmmd"].value
    assert headline["cmmd_floor"] == measured.measures["cmmd"].floor
    assert not any(name.startswith("frechet") for name in headline)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"frechet_distance": 0.7, "guidance_scale": 1.5}', "another version of this project"),
        ("not JSON", "another version of this project"),
        (None, "is missing"),
    ],
)
def test_measurements_of_an_earlier_form_are_refused_with_the_remedy(tmp_path, text, complaint):
    path = tmp_path / measures.FILE
    if text:
        path.write_text(text)
    with pytest.raises(StageError, match=f"{complaint}.*; run 'dvc repro evaluate'|{complaint}; run 'dvc repro eval"):
        measures.read(path)


def test_the_table_compares_samplers_at_equal_numbers_and_leaves_out_what_misleads(evaluated):
    rows = table(evaluated / "evaluation" / "samplers.csv")
    assert [(row["sampler"], row["steps"], row["guidance_scale"], row["n"], row["seed_blocks"]) for row in rows] == [
        ("dpm_solver_pp_2m", "3", "1.0", "150", "3"),
        ("dpm_solver_pp_2m", "3", "2.0", "60", "3"),
        ("dpm_solver_pp_2m", "3", "1.0", "80", "1"),
        ("ddim", "10", "1.0", "80", "1"),
        ("ddim", "30", "1.0", "80", "1"),  # as many as there are timesteps
        *(("dpm_solver_pp_2m", steps, "1.0", "80", "1") for steps in ("5", "10", "20")),
        ("ddpm", "30", "1.0", "7", "1"),
    ]
    found = measured_in(evaluated).measures
    assert float(rows[0]["frechet_distance"]) == pytest.approx(found["frechet_distance"].value, rel=1e-5)
    assert float(rows[1]["label_accuracy"]) == pytest.approx(found["label_accuracy"].value, rel=1e-5)
    small = [row for row in rows if int(row["n"]) < 2 * 32]
    assert [row["frechet_distance"] + row["kid"] + row["inception_style_score"] for row in small] == ["", ""]
    assert {row["note"] for row in small} == {"too few images for distances (64 needed)"}
    assert all(row["label_accuracy"] and row["clip_score"] for row in rows)


def test_ddim_with_added_noise_stands_beside_ddim_without(tree, tmp_path):
    noisy = {"sampler": "ddim", "steps": 30, "eta": 0.5, "n_sweep": 1, "guidance_sweep": ()}
    few = {"n_distance": 81, "n_accuracy": 4}
    out = run(tree, tmp_path, PARAMS.model_copy(update=noisy | few))
    rows = table(out / "evaluation" / "samplers.csv")
    compared = {(row["sampler"], row["steps"], row["eta"]): row for row in rows if row["n"] == "80"}
    noisy_row, plain = compared["ddim", "30", "0.5"], compared["ddim", "30", ""]
    assert noisy_row["frechet_distance"] != plain["frechet_distance"]
    assert {"ddim (eta 0.5), 30 steps, guidance 1", "ddim, 30 steps, guidance 1"} < set(
        read(out / "timing" / "evaluate.json")["seconds_per_image"]
    )


@pytest.fixture(scope="module")
def tuned(tree, tmp_path_factory, pipeline):
    """The tree with a pipeline that was tuned for consistency, whose teacher has other weights; read it only."""
    root = tmp_path_factory.mktemp("tuned")
    for name in ("data", "judge"):
        (root / name).symlink_to(tree / name)
    (root / "outputs" / "pipeline").mkdir(parents=True)
    own = pipeline.network.state_dict()
    teacher = {name: weight * 0.5 for name, weight in own.items()}
    network, info = pipeline.network, pipeline.info
    noise = schedules.betas("cosine", judge_inputs.TIMESTEPS)
    save_pipeline(root / "outputs" / "pipeline", network, own, noise, info, companions={"teacher": teacher})
    return root


def test_a_consistency_model_stands_beside_its_teacher(tuned, tmp_path):
    few = {"sampler": "consistency", "steps": 2, "n_sweep": 1, "guidance_sweep": ()}
    out = run(tuned, tmp_path, PARAMS.model_copy(update=few))
    rows = table(out / "evaluation" / "samplers.csv")
    assert [(row["sampler"], row["weights"], row["steps"], row["n"]) for row in rows] == [
        ("consistency", "", "2", "150"),
        ("consistency", "", "2", "60"),
        ("consistency", "", "2", "80"),
        ("consistency", "", "1", "80"),
        ("consistency", "", "4", "80"),
        ("ddim", "teacher", "10", "80"),
        ("ddim", "teacher", "20", "80"),
    ]
    assert "teacher: ddim, 20 steps, guidance 1" in read(out / "timing" / "evaluate.json")["seconds_per_image"]


def test_the_teacher_draws_with_its_own_weights(tuned, judge):
    model = load_pipeline(tuned / "outputs" / "pipeline")
    declared = declare(model, tuned / "data" / "images", judge, PARAMS)
    swapped = replace(model, network=model.companions["teacher"])
    sampling = replace(declared.unguided, sampler="ddim")
    drawn = draws.draw(model, declared, 4, sampling, weights="teacher")
    assert (drawn.pixels == draws.draw(swapped, declared, 4, sampling).pixels).all()
    assert (drawn.pixels != draws.draw(model, declared, 4, sampling).pixels).any()


def test_too_few_images_for_the_features_stop_before_anything_is_drawn(tree, tmp_path, monkeypatch):
    few = PARAMS.model_copy(update={"n_distance": 40})
    monkeypatch.setattr(draws, "draw", lambda *_, **__: pytest.fail("drew"))
    with pytest.raises(
        StageError, match=r"40 samples and 134 held-out .* 32 dimensions, which need 64 of each; .*small"
    ):
        run(tree, tmp_path, few)


def test_few_images_are_measured_on_request_and_say_so(tree, tmp_path, capsys):
    out = run(tree, tmp_path, BRIEF.model_copy(update={"n_distance": 40, "n_compare": 8, "allow_small_n": True}))
    assert "32 dimensions" in measured_in(out).small_n
    printed = [line for line in capsys.readouterr().out.splitlines() if "evaluate: frechet_distance" in line]
    assert printed and all("few images: 40 samples" in line for line in printed)
    assert all(row["frechet_distance"] for row in table(out / "evaluation" / "samplers.csv"))


def test_the_sweep_shows_distance_and_agreement_at_each_guidance_scale(evaluated):
    rows = table(evaluated / "evaluation" / "guidance.csv")
    assert [(row["guidance_scale"], row["n"]) for row in rows] == [("1.0", "70"), ("2.0", "70"), ("4.0", "70")]
    assert all(row["frechet_distance"] and row["clip_score"] and row["label_accuracy"] for row in rows)
    assert len({row["frechet_distance"] for row in rows}) == 3


def with_guide(tree, root, classes=None):
    """The same data and judge with a pipeline that has a guide."""
    for name in ("data", "judge"):
        (root / name).symlink_to(tree / name)
    judge_inputs.write_pipeline(root, classes, guide=True)
    return root


def test_a_model_with_a_guide_is_swept_with_both_kinds_of_guidance(tree, tmp_path, evaluated):
    params = BRIEF.model_copy(update={"guidance": "auto", "guidance_sweep": (1.0, 2.0)})
    out = run(with_guide(tree, tmp_path), tmp_path, params)
    rows = table(out / "evaluation" / "guidance.csv")
    assert [(row["guidance"], row["guidance_scale"]) for row in rows] == [
        ("", "1.0"),
        ("classifier_free", "2.0"),
        ("auto", "2.0"),
    ]
    assert len({row["frechet_distance"] for row in rows}) == 3
    samplers = table(out / "evaluation" / "samplers.csv")
    assert [row["guidance"] for row in samplers[:3]] == ["", "auto", ""]
    measured, plain = measured_in(out), measured_in(evaluated)
    assert measured.measures["label_accuracy"].condition == "guidance 2, auto"
    assert measured.measures["frechet_distance"].condition == "unguided"
    assert (measured.guided_kind, measured.headline_numbers()["guided_kind"]) == ("auto", "auto")
    assert (plain.guided_kind, plain.measures["label_accuracy"].condition) == ("classifier_free", "guidance 2")
    declared = Protocol.read(out / "evaluation" / "protocol.json")
    assert (declared.unguided.guidance, declared.guided.guidance) == ("classifier_free", "auto")
    assert measured.fingerprint == plain.fingerprint, "guidance is a setting and no part of the measurement"
    seconds = read(out / "timing" / "evaluate.json")["seconds_per_image"]
    assert {f"dpm_solver_pp_2m, 3 steps, guidance {end}" for end in ("1", "2", "2, auto")} < set(seconds)


def test_an_unconditional_model_with_a_guide_is_measured_with_autoguidance(tree, tmp_path):
    params = BRIEF.model_copy(update={"guidance": "auto", "guidance_sweep": (1.0, 4.0)})
    root = with_guide(tree, tmp_path, classes=[])
    Prior().write(root / "prior" / PRIOR)
    arguments = [root / "outputs" / "pipeline", root / "data" / "images", root / "data" / "accepted.json"]
    arguments += [root / "judge", root / "averages", root / "prior"]
    arguments += [root / "metrics.json", root / "evaluation", root / "timing.json"]
    evaluate(*arguments, params)
    rows = table(root / "evaluation" / "guidance.csv")
    assert [(row["guidance"], row["guidance_scale"]) for row in rows] == [("", "1.0"), ("auto", "4.0")]
    guided = table(root / "evaluation" / "samplers.csv")[1]
    assert (guided["guidance"], guided["guidance_scale"], guided["seed_blocks"]) == ("auto", "2.0", "3")
    assert {name for name, found in measured_in(root).measures.items() if found.drawn == "guided"} == set()
    assert (root / "evaluation" / "grid_guided.png").exists() and not (root / "evaluation" / "classes.csv").exists()


def test_what_the_sweep_needs_and_was_drawn_already_is_not_drawn_again(tree, tmp_path, monkeypatch):
    drawn, real = [], draws.draw

    def counted(pipeline, protocol, count, sampling, block=0):
        drawn.append(sampling.guidance_scale)
        return real(pipeline, protocol, count, sampling, block)

    monkeypatch.setattr(draws, "draw", counted)
    params = BRIEF.model_copy(update={"guidance_sweep": (1.0, 2.0, 4.0), "n_sweep": 60})
    rows = table(run(tree, tmp_path, params) / "evaluation" / "guidance.csv")
    assert drawn.count(4.0) == 1 and drawn.count(2.0) == 3
    assert {row["note"] for row in rows} == {"too few images for distances (64 needed)"}


def test_classes_and_timesteps_have_tables_of_their_own(evaluated):
    rows = table(evaluated / "evaluation" / "classes.csv")
    assert [(row["class"], row["n"], row["n_unguided"]) for row in rows] == [
        (name, "60", "150") for name in judge_inputs.CLASSES
    ]
    accuracy = measured_in(evaluated).measures["label_accuracy"].value
    assert np.mean([float(row["label_accuracy"]) for row in rows]) == pytest.approx(accuracy, abs=1e-5)
    assert all(float(row["kid"]) > float(row["kid_floor"]) for row in rows)
    steps = table(evaluated / "evaluation" / "timesteps.csv")
    assert [row["timestep"] for row in steps][:: len(steps) - 1] == ["0", "29"]
    assert float(steps[0]["squared_error"]) < float(steps[-1]["squared_error"])
    assert float(steps[0]["psnr"]) == pytest.approx(10 * np.log10(4 / float(steps[0]["squared_error"])), rel=1e-4)


def test_a_copyist_is_caught_and_held_out_images_are_not(tree, pipeline, judge):
    images = tree / "data" / "images"
    scorer = Scorer(images, judge, declare(pipeline, images, judge, PARAMS))
    copies = Images.of(scorer.train.pixels, np.arange(40))
    rows, distances = scorer.nearest_training(copies)
    assert rows.tolist() == list(range(40)) and distances.max() < 1e-3
    assert scorer.near_copies(copies) == {"near_copies": 1.0}
    assert scorer.near_copies(Images.of(scorer.held_out.pixels))["near_copies"] <= 0.02


def test_grids_show_one_titled_column_per_class(evaluated, pipeline):
    with PIL.Image.open(evaluated / "evaluation" / "grid_guided.png") as grid:
        assert grid.width == 3 * 80 + 2 * 2
        assert grid.height > 10 * 80 + 9 * 2  # the titles stand above
    labels = [0, 1, 2, 0]
    drawn = draws.Draw(Sampling("ddim", 1), labels, np.zeros((4, 1, 8, 8), np.uint8), 0.0)
    assert grid_of(drawn, judge_inputs.CLASSES).height < 2 * 80  # an incomplete row is left out
    assert grid_of(drawn.first(2), judge_inputs.CLASSES).width > 3 * 80  # too few for a row of all: plain
    large = draws.Draw(Sampling("ddim", 1), labels[:3], np.zeros((3, 1, 512, 512), np.uint8), 0.0)
    assert grid_of(large, judge_inputs.CLASSES).width < 3 * 160  # shown smaller


def test_a_rerun_gives_the_same_bytes_and_only_timing_holds_times(tree, evaluated, tmp_path):
    again = run(tree, tmp_path)
    first, second = contents(evaluated), contents(again)
    assert {name for name in first if first[name] != second[name]} <= {"timing/evaluate.json"}
    seconds = read(again / "timing" / "evaluate.json")["seconds_per_image"]
    assert set(seconds) == {
        "ddim, 10 steps, guidance 1",
        *(f"dpm_solver_pp_2m, {steps} steps, guidance 1" for steps in (3, 5, 10, 20)),
        "dpm_solver_pp_2m, 3 steps, guidance 2",
        "dpm_solver_pp_2m, 3 steps, guidance 4",
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
    assert shown == read(evaluated / "metrics.json")
    assert "frechet_distance_floor" in dvc("metrics", "show")


def test_with_fewer_images_than_classes_some_classes_have_no_number(tree, tmp_path):
    few = {"n_accuracy": 2, "n_compare": 2, "n_slowest": 2, "guidance_sweep": ()}
    rows = table(run(tree, tmp_path, PARAMS.model_copy(update=few)) / "evaluation" / "classes.csv")
    assert [row["n"] for row in rows] == ["3", "3", "0"]  # three seed blocks
    assert rows[1]["label_accuracy"] and not rows[2]["label_accuracy"]
