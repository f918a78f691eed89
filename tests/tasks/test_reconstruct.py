"""Averages reconstructed after a real, tiny training: their weights, the sweep, the pipeline that is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file

from tasks import reconstruct
from tasks.formats.averages import FILE, REFERENCE, Averages, Snapshot
from tasks.params import CodecParams, EncodeParams, load
from tasks.reconstruction import weights
from tasks.runtime.errors import StageError
from tests.support import judge_inputs, train_inputs
from tests.support.train_inputs import ROOT

TRAIN = {
    "steps": 40,
    "warmup_steps": 3,
    "sample_every": 40,
    "checkpoint_every": 40,
    "batch_size": 32,
    "ema": ["std-0.05", "std-0.10", "std-0.07"],
    "pipeline_ema": "std-0.10",
    "ema_snapshots": 16,
}
EVALUATE = {"steps": 3, "n_distance": 80, "n_accuracy": 8, "n_compare": 8, "n_slowest": 2, "guidance_sweep": []}
NAMES = {"latents": "data/latents", "codec": "outputs/codec", "pipeline": "outputs/pipeline"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, migrated_database):
    """A work tree in which the stages up to `evaluate` have run on real digits; read it only."""
    from tasks.codec import codec
    from tasks.encode import encode
    from tasks.evaluate import evaluate
    from tasks.formats.prior import FILE as PRIOR
    from tasks.formats.prior import Prior
    from tasks.train import train

    root = tmp_path_factory.mktemp("finished")
    images, accepted = judge_inputs.write_images(root), root / "data" / "accepted.json"
    train_inputs.write_params(root, **TRAIN)
    document = yaml.safe_load((root / "params.yaml").read_text())
    document["evaluate"] |= EVALUATE
    (root / "params.yaml").write_text(yaml.safe_dump(document))
    params = load(root / "params.yaml")
    outputs, reports = root / "outputs", root / "reports"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in train_inputs.environment(root, migrated_database).items():
            patch.setenv(name, value)
        patch.chdir(ROOT)
        codec(images, accepted, outputs / "codec", CodecParams(kind="identity", conditioning="label"), params.image)
        encode(images, accepted, outputs / "codec", root / "data" / "latents", EncodeParams())
        Prior().write(outputs / "prior" / PRIOR)
        inputs = root / "data" / "latents", outputs / "codec", accepted, outputs / "prior"
        written = outputs / "pipeline", outputs / "averages", reports / "train"
        train(*inputs, *written, params.model, params.diffusion, params.train)
        judge_inputs.run_judge(root).rename(outputs / "judge")
        written = [reports / "metrics.json", reports / "evaluation", reports / "timing.json"]
        measured = outputs / "pipeline", images, accepted, *(outputs / name for name in ("judge", "averages", "prior"))
        evaluate(*measured, *written, params.evaluate)
    return root


@pytest.fixture
def tree(finished, tmp_path, monkeypatch):
    """A work tree of its own with links to the files of `finished`, as the current folder."""
    (tmp_path / "reports").mkdir()
    for name in ("data", "outputs", "params.yaml", "reports/train", "reports/evaluation"):
        (tmp_path / name).symlink_to(finished / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    return tmp_path


def of_two(kept: Averages) -> Averages:
    """The snapshots without those of the average that is to be reconstructed."""
    snapshots = [snapshot for snapshot in kept.snapshots if snapshot.profile != "std-0.07"]
    return kept.model_copy(update={"snapshots": snapshots})


def flat(tensors) -> np.ndarray:
    return np.concatenate([tensors[name].double().numpy().ravel() for name in sorted(tensors)])


def test_the_training_keeps_snapshots_over_the_whole_run(finished):
    kept = weights.open_averages(finished / "outputs" / "averages")
    assert sorted({snapshot.step for snapshot in kept.snapshots}) == [*range(4, 41, 4)]
    assert {snapshot.profile for snapshot in kept.snapshots} == {"std-0.05", "std-0.10", "std-0.07"}
    reference = load_file(finished / "outputs/averages" / REFERENCE)
    last = load_file(finished / "outputs/averages" / "step-00000040.std-0.10.safetensors")
    whole = load_file(finished / "outputs/pipeline/unet/diffusion_pytorch_model.safetensors")
    assert set(last) == set(reference) == set(whole)
    assert all(np.allclose(reference[name] + last[name], whole[name], rtol=1e-5, atol=1e-5) for name in whole)
    assert not all(np.allclose(reference[name], whole[name], rtol=1e-5, atol=1e-5) for name in whole)


def test_an_average_that_was_not_stored_is_the_one_that_training_tracked(finished):
    folder = finished / "outputs" / "averages"
    kept = weights.open_averages(folder)
    true, other, found = (
        flat(weights.combined(folder, stored, weights.in_reach(stored, std))[0])
        for stored, std in ((kept, 0.07), (kept, 0.10), (of_two(kept), 0.07))
    )
    assert weights.in_reach(kept, 0.07).error < 1e-6 < weights.in_reach(of_two(kept), 0.07).error
    assert np.linalg.norm(found - true) < 0.05 * np.linalg.norm(other - true)


def test_the_sweep_measures_each_width_as_training_and_evaluation_did(tree, capsys):
    reconstruct.measure([0.10, 0.05, 0.12], blocks=3)
    found = json.loads((tree / "reports" / "reconstruct.json").read_text())
    assert [row["width"] for row in found["rows"]] == [0.05, 0.10, 0.12]
    measured = json.loads((tree / "reports" / "evaluation" / "measurements.json").read_text())
    trained = json.loads((tree / "reports" / "train" / "run.json").read_text())
    for name in ("frechet_distance", "kid", "cmmd"):
        own = measured["measures"][name]
        assert found["rows"][1][name] == pytest.approx(own["value"], rel=0.02, abs=2e-4), "the pipeline's own average"
        assert found["floors"][name] == pytest.approx(own["floor"], rel=1e-4)
    for row, profile in zip(found["rows"], ("std-0.05", "std-0.10"), strict=False):
        assert row["held_out_loss"] == pytest.approx(trained["averages"][profile], rel=1e-3)
        assert row["profile_error"] == pytest.approx(0, abs=1e-6)
    assert 0 < found["rows"][2]["profile_error"] < weights.MAX_ERROR
    assert (tree / "reports" / "reconstruct.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line[:3] == "0.1" or line[:4] == "0.05"] == ["0.05", "0.1", "0.12"]
    assert sum(" *" in line for line in lines) == 1
    assert [line.split()[0] for line in lines if "(the pipeline)" in line] == ["0.1"]


def test_a_width_is_written_as_a_pipeline_that_draws(tree):
    from models.pipeline import load_pipeline
    from tasks.runtime import integrity

    reconstruct.write(0.12, tree / "wide")
    with integrity.loading(tree / "wide", "afterimage.json", "train"):
        model = load_pipeline(tree / "wide")
    assert model.sample([1, 2], labels=[0, 1]).shape == (2, 1, 8, 8)
    kept = weights.open_averages(Path("outputs/averages"))
    expected, _ = weights.combined(Path("outputs/averages"), kept, weights.in_reach(kept, 0.12))
    found = load_file(tree / "wide" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all((found[name] == expected[name]).all() for name in expected) and set(found) == set(expected)
    with pytest.raises(StageError, match=r"wide exists; give --out the name of a new folder"):
        reconstruct.write(0.12, tree / "wide")


def described(folder: Path, **changes) -> None:
    """Make `folder` outputs/averages of a training that kept only these snapshots."""
    values = {"train_key": "k", "steps": 4, "snapshots": [], "files": {}}
    folder.mkdir(parents=True)
    Averages.model_validate(values | changes).write(folder / FILE)


def test_what_cannot_be_reconstructed_is_refused_in_a_sentence(tree, tmp_path):
    with pytest.raises(StageError, match=r"^the width 0\.285 is out of reach .* error of its profile is 15%, over 10%"):
        reconstruct.measure([0.05, 0.285], blocks=1)
    with pytest.raises(StageError, match=r"^the width 0\.4 must lie between 0 and 0\.289$"):
        reconstruct.write(0.4, tree / "new")
    with pytest.raises(StageError, match=r"^--blocks 9 must lie between 1 and evaluate\.seed_blocks 3$"):
        reconstruct.measure([0.05], blocks=9)
    described(tmp_path / "none" / "averages")
    with pytest.raises(StageError, match=r"kept no snapshots .* set train\.ema_snapshots to 16 and run 'dvc repro tr"):
        weights.open_averages(tmp_path / "none" / "averages")
    with pytest.raises(StageError, match=r"holds no averages\.json; run 'dvc repro train'"):
        weights.open_averages(tmp_path)


def test_snapshots_of_another_training_are_refused(tree, monkeypatch):
    described(tree / "other", snapshots=[Snapshot(file="a", step=4, profile="std-0.10")])
    monkeypatch.setattr(reconstruct, "AVERAGES", tree / "other")
    with pytest.raises(StageError, match="are of different trainings; run 'dvc repro train'"):
        reconstruct.write(0.1, tree / "new")


def test_parameters_that_changed_since_the_training_are_refused(tree):
    document = yaml.safe_load((tree / "params.yaml").read_text())
    document["train"]["learning_rate"] = 0.003
    (tree / "params.yaml").unlink()
    (tree / "params.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(StageError, match=r"changed since the training \(train\.learning_rate 0\.002 -> 0\.003\)"):
        reconstruct.measure([0.05], blocks=1)


def test_an_adapter_without_its_base_is_refused(tmp_path):
    import torch

    from models.posthoc_ema import Combination

    for name in ("a", REFERENCE):
        save_file({"mid.lora_A.default.weight": torch.ones(2, 2)}, tmp_path / name)
    kept = Averages(train_key="k", steps=4, snapshots=[Snapshot(file="a", step=4, profile="std-0.10")], files={})
    with pytest.raises(StageError, match=r"LoRA adapter alone \(model\.lora_rank\), so its snapshots lack the base"):
        weights.combined(tmp_path, kept, Combination(np.ones(1), 0.0))


@pytest.mark.parametrize(
    ("steps", "most", "kept"),
    [
        (3, 4, [1, 2, 3]),
        (12, 4, [4, 8, 12]),
        (300, 8, [64, 128, 192, 256]),
        (500, 16, [*range(32, 500, 32)]),
        (1, 1, [1]),
        (9, 0, []),
        (5, 1, [4]),
    ],
)
def test_the_steps_that_a_run_keeps(steps, most, kept):
    from tasks.training.averages import kept_steps

    assert kept_steps(steps, most) == kept
    longer = kept_steps(steps + 7, most)
    assert {step for step in longer if step <= steps} <= set(kept), "a longer run continues a shorter one"


def test_a_longer_run_that_continues_a_shorter_one_has_the_snapshots_of_one_that_never_stopped(trained, tmp_path):
    options = {"ema": ["std-0.05", "std-0.10"], "pipeline_ema": "std-0.05", "lr_schedule": "constant"}
    options |= {"ema_snapshots": 4, "checkpoint_every": 5}
    trained(tmp_path / "parts", steps=10, **options)
    trained(tmp_path / "parts", steps=22, **options)
    whole = trained(tmp_path / "whole", steps=22, **options)
    parts, at_once = (train_inputs.results(folder) for folder in (tmp_path / "parts", whole))
    assert {name for name in at_once if name.startswith("averages/")} == {
        "averages/averages.json",
        "averages/reference.safetensors",
        *(f"averages/step-{step:08d}.{name}.safetensors" for step in (8, 16, 22) for name in options["ema"]),
    }
    assert parts == at_once


def test_a_snapshot_that_is_missing_is_named(trained, tmp_path, capsys):
    options = {"ema": ["std-0.10"], "pipeline_ema": "std-0.10"}
    folder = trained(**options)
    (lost,) = (folder / "scratch").rglob("averages/step-00000004.*")
    lost.unlink()
    trained(**options)
    assert "train: 1 snapshots of the averages are missing in" in capsys.readouterr().err
    assert [each.step for each in weights.open_averages(folder / "averages").snapshots] == [8, 12]


def test_options_that_belong_together():
    command = [sys.executable, "-m", "tasks.reconstruct", "--width", "0.07"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--width and --out belong together" in done.stderr
