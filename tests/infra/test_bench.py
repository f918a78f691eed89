"""`make bench`, tiny: that it measures what it says, keeps what is measured, and compares like with like. No timing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from infra.bench import __main__ as bench
from infra.bench import cases, encoding, inputs, levers, paired, quality, report, throughput
from infra.bench.clock import Block
from infra.bench.results import Piecewise
from tasks.params.model import TrainParams

TINY = [
    "image.resolution=8",
    "model.block_out_channels=[8,16]",
    "model.attention=[false,true]",
    "model.norm_num_groups=4",
    "diffusion.timesteps=50",
    "train.warmup_steps=2",
    "train.batch_size=8",
    "judge.classifier_steps=20",
]
ROOT = Path(__file__).resolve().parents[2]
DIT = "model.architecture=dit model.dit.width=16 model.dit.depth=2 model.dit.heads=2"
"""Two blocks, which share their embedding."""
FEW = ["--samples", "64", "--sampler-steps", "2"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def params():
    return inputs.parameters("digits", None, *TINY, "train.steps=7")


@pytest.fixture(scope="module")
def prepared(work, params) -> inputs.Inputs:
    return inputs.prepare(work, params, judge=True)


def run(work: Path, reports: Path, monkeypatch, *arguments: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["bench", "--work", str(work), "--reports", str(reports), *arguments])
    bench.main()
    return json.loads((reports / "bench.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_both_sides_train_on_the_same_pictures(params, prepared):
    from infra.bench.peer import ImageFiles
    from tasks.pictures.images import load_pixels

    files = ImageFiles(prepared.files, params.image.resolution, params.image.channels, flip=False)
    theirs = np.stack([files[row].numpy() for row in range(len(files))])
    ours = load_pixels(prepared.images, "train", params.image).pixels / np.float32(127.5) - 1
    assert theirs.shape == ours.shape and theirs.dtype == ours.dtype
    order = lambda pixels: sorted(pixels.round(3).reshape(len(pixels), -1).tolist())  # noqa: E731
    np.testing.assert_allclose(order(theirs), order(ours), atol=2e-3)


@pytest.mark.slow
def test_our_loop_in_blocks_is_our_loop(params, prepared, tmp_path, monkeypatch):
    import torch

    from infra.bench.ours import Ours

    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path))
    whole, parts = Ours(params, prepared), Ours(params, prepared)
    whole.advance(7)
    for steps in (1, 4, 2):
        parts.advance(steps)
    assert all(torch.equal(a, b) for a, b in zip(whole.averaged().values(), parts.averaged().values(), strict=True))


def test_the_floor_is_of_as_many_images_of_every_class():
    labels = np.repeat([0, 1, 2], [50, 20, 30])
    rows = quality.balanced(labels, 12)
    assert len(set(rows)) == 12 and np.bincount(labels[rows]).tolist() == [4, 4, 4]
    assert len(set(quality.balanced(labels, 500))) == 100


@pytest.mark.parametrize("case", sorted({*cases.THROUGHPUT_ON_CPU, *cases.THROUGHPUT_ON_GPU}))
def test_every_case_of_throughput_is_a_valid_preset(case):
    preset = case.split(":")[0]
    assert inputs.parameters(preset, None, "conditioning=none").codec.conditioning == "none"


@pytest.mark.slow
def test_throughput_is_measured_once_and_tabulated(work, prepared, tmp_path, monkeypatch, capsys):
    arguments = ("throughput", "--cases", "digits:4", "--rounds", "2", "--block-seconds", "0.05", "--set", *TINY)
    first = run(work, tmp_path, monkeypatch, *arguments)
    rows = first["throughput"]["rows"]
    assert [(row["peer_precision"], row["ours_precision"]) for row in rows] == [("no", "no"), ("bf16", "bf16")]
    assert all(row["compared"] == "batch 4" and row["ratio"] > 0 and 0 <= row["ours_utilisation"] < 1 for row in rows)
    capsys.readouterr()
    assert run(work, tmp_path, monkeypatch, *arguments) == first
    assert "was measured with these arguments" in capsys.readouterr().out
    assert f"| {rows[0]['ours_img_s']} |" in (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert (tmp_path / "bench" / "throughput.csv").read_text(encoding="utf-8").count("\n") == 3


def test_a_part_that_was_cut_off_goes_on_with_the_piece_that_it_lacks(tmp_path):
    made = []

    def piece(name, kept):
        return kept.piece([name], lambda: made.append(name) or {"is": name})

    with pytest.raises(KeyboardInterrupt), Piecewise(tmp_path) as kept:
        piece("a", kept)
        raise KeyboardInterrupt
    with Piecewise(tmp_path) as kept:
        assert [piece("a", kept), piece("b", kept)] == [{"is": "a"}, {"is": "b"}]
    assert made == ["a", "b"]
    with Piecewise(tmp_path) as kept:  # the part was whole: measured again, it is measured anew
        piece("a", kept)
    assert made == ["a", "b", "a"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_part_can_be_rehearsed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--work", str(tmp_path), "all", "--rehearse"])
    bench.main()
    assert "part 7 of 7: levers" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "rehearsal" / "bench.json").read_text(encoding="utf-8"))) == {
        "encoding",
        "levers",
        "quality_digits",
        "quality_digits_unconditional",
        "sampling",
        "startup",
        "throughput",
    }


@pytest.mark.slow
def test_ours_stops_where_the_reference_ended(work, prepared, tmp_path, monkeypatch):
    arguments = ["quality", "--seeds", "1", "--steps", "4", "--points", "2", "--own-points", "10", *FEW]
    measured = run(work, tmp_path, monkeypatch, *arguments, "--set", *TINY, "train.steps=40")["quality_digits"]
    found = measured["runs"][0]
    peer, ours = found["peer"]["curve"], found["ours"]["curve"]
    assert [row["step"] for row in peer] == [2, 4] and peer[-1]["distance"] == found["target"]
    assert all(row["distance"] > found["target"] for row in ours[:-1])
    assert ours[-1]["distance"] <= found["target"] or ours[-1]["step"] == 40
    assert (tmp_path / "bench" / "quality_digits.png").stat().st_size > 1000
    # what is finished is read, not run: another folder of reports gets the same numbers, clock included
    again = run(work, tmp_path / "other", monkeypatch, *arguments, "--set", *TINY, "train.steps=40")["quality_digits"]
    assert again["runs"] == measured["runs"]


def test_a_distance_that_was_not_reached_is_said(tmp_path):
    curve = [{"step": 5, "seconds": 1.0, "cpu_seconds": 1.0, "distance": 9.0}]
    never = {"seed": 0, "target": 3.0, "ratio": None, "ratio_by_cpu_time": None}
    sides = {"peer": {"curve": curve}, "ours": {"curve": curve}}
    machine = {"cpu": "a", "gpu": None, "cores": 2, "torch": "2"}
    part = {"machine": machine, "load": [0.1, 2.0], "floor": 1.0, "ratio": None, "runs": [never | sides]}
    how = {"samples": 64, "sampler_steps": 20, "samplers": ["ddim", "dpm_solver_pp_2m"]}
    report.write(tmp_path, {"quality_digits": part | {"arguments": {"measure": how, "overrides": []}}})
    text = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert "| 0 | 1.0 | 3.0 | not reached |" in text
    assert "of 64 images drawn in 20 network evaluations each by DDIM or DPM-Solver++ (2M)" in text
    report.write(
        tmp_path, {"quality_digits": part | {"arguments": {"measure": how, "overrides": ["conditioning=none"]}}}
    )
    assert "ours by its preset without labels" in (tmp_path / "bench.md").read_text(encoding="utf-8")


def test_operations_of_the_papers_network():
    """6.1 G multiply-additions forward, as commonly counted for DDPM on CIFAR-10; training takes three times that."""
    flops = throughput.training_flops(inputs.parameters("cifar10_ddpm", None))
    assert flops == pytest.approx(3 * 2 * 6.1e9, rel=0.05)


SMALL_LATENTS = [
    "image.resolution=16",
    "codec.autoencoder.widths=[8,16]",
    "codec.text.width=16",
    "codec.text.layers=1",
    "model.block_out_channels=[8,16]",
    "model.attention=[false,true]",
    "model.norm_num_groups=4",
    "train.warmup_steps=2",
    "train.batch_size=8",
    "validate.warn_only=[near_duplicates]",
]


@pytest.mark.slow
def test_encoding_online_draws_what_is_stored(work, tmp_path, monkeypatch):
    """Both sides of the measurement train on the same samples, up to the rounding to bfloat16 of what is stored."""
    import torch

    from infra.bench.ours import Ours

    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path))
    params = inputs.parameters("digits", None, *encoding.COMMON, *cases.ENCODING["tiny"], *SMALL_LATENTS)
    prepared = inputs.prepare(work, params)
    stored = Ours(params, prepared).run.batches
    encoders = encoding.Encoders(params, prepared, stored)
    reads = {
        "files": (encoding.Images(params, prepared), encoding.Captions(prepared, encoders.text)),
        "memory": (encoding.Pixels(params, prepared), encoding.Tokens(prepared, encoders.text)),
    }
    for step, read in ((0, "files"), (5, "files"), (5, "memory")):
        a, b = stored.draw(step), encoders.replacing(stored, *reads[read]).draw(step)
        assert torch.equal(a.t, b.t) and torch.equal(a.eps, b.eps)
        assert torch.allclose(a.x0, b.x0, atol=0.03) and torch.allclose(a.condition, b.condition, atol=0.03)
    assert not torch.allclose(stored.draw(0).x0, stored.draw(1).x0, atol=0.03)

    arguments = ("encoding", "--cases", "tiny", "--rounds", "2", "--block-seconds", "0.05", "--set", *SMALL_LATENTS)
    (row,) = run(work, tmp_path, monkeypatch, *arguments)["encoding"]["rows"]
    assert row["latent"] == [4, 8, 8] and row["stored_ms"] > 0 and row["online_ms"] > 0 and row["encode_img_s"] > 0
    assert f"| {row['online_ms']} |" in (tmp_path / "bench.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_small_stable_diffusion_keeps_the_proportions_of_the_large_one():
    """What encoding adds to a training step of Stable Diffusion 1.5 at 512 pixels, and of its small likeness."""
    shape = [
        "image.resolution=512",
        "model.heads=8",
        "codec.autoencoder.widths=[128,256,512,512]",
        "codec.autoencoder.layers_per_block=2",
    ]
    text = ["codec.text.width=768", "model.block_out_channels=[320,640,1280,1280]", "model.norm_num_groups=32"]
    small = inputs.parameters("digits", None, *encoding.COMMON, *cases.ENCODING["stable_diffusion_8th"])
    large = inputs.parameters("digits", None, *encoding.COMMON, *cases.ENCODING["stable_diffusion_8th"], *shape, *text)
    ratios = [encoding.ratio_by_operations(params) for params in (small, large)]
    assert ratios[0] == pytest.approx(ratios[1], rel=0.01) and ratios[1] == pytest.approx(1.46, abs=0.01)


def test_encoding_breaks_even_where_it_has_cost_what_it_saved():
    """An image: 20 ms a step without, 50 ms with encoding in it, and 60 ms to encode it once: two epochs."""
    stored, online, once = Block(10, 100, 2.0, 2.0), Block(10, 100, 5.0, 4.0), Block(1, 50, 3.0, 3.0)
    encoders = Block(10, 100, 3.0, 3.0)
    found = encoding.compared([stored, stored], [online, online], [encoders, encoders], once)
    assert (found["ratio"], found["ratio_by_cpu_time"], found["break_even_epoch"]) == (2.5, 2.0, 2.0)
    assert (found["encoders_ms"], found["encoders_ratio"]) == (300, 1.5)
    assert encoding.compared([online], [stored], [encoders], once)["break_even_epoch"] is None


@pytest.mark.parametrize(("preset", "changes"), [("digits", levers.LEVERS), ("cifar10_tiny", levers.ON_CIFAR)])
def test_every_lever_is_valid_and_differs(preset, changes):
    found = [inputs.parameters(preset, ROOT / "README.md", *change.split()) for _, change in [("", ""), *changes]]
    assert len({params.model_dump_json() for params in found}) == len(found)


def test_the_three_levers_on_cifar_change_path_density_and_optimizer():
    found = [inputs.parameters("cifar10_tiny", ROOT, *change.split()) for _, change in [("", ""), *levers.ON_CIFAR]]
    assert [params.train.optimizer for params in found] == ["muon", "muon", "muon", "adamw"]
    assert [params.diffusion.loss_weighting for params in found] == ["plain", "plain", "min_snr", "min_snr"]
    assert [params.diffusion.timestep_density for params in found] == ["logit_normal"] * 2 + ["uniform"] * 2
    assert [params.diffusion.schedule for params in found] == ["rectified_flow", "cosine", "cosine", "cosine"]


def test_the_measured_command_has_the_arguments_of_the_stage(tmp_path):
    from infra.bench import startup
    from infra.bench.inputs import Inputs
    from tasks.runtime import stage
    from tasks.train import train

    *paths, option, _ = startup.arguments(tmp_path, Inputs(tmp_path, tmp_path, tmp_path))
    assert option == "--params" and [Path(path).name for path in paths[3:]] == [
        "prior",
        "pipeline",
        "averages",
        "report",
    ]
    assert len(paths) == len(stage.paths_of(train))


def test_a_training_that_ends_without_a_step_is_said(tmp_path, monkeypatch):
    from infra.bench import startup

    monkeypatch.setattr(startup, "arguments", lambda *_: ["--no-such-option"])
    with pytest.raises(RuntimeError, match="the training command made no step"):
        startup._first_step(tmp_path, None, "fresh")


def test_a_missing_archive_is_said_in_one_sentence(work, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no CIFAR-10 without --cifar"):
        run(work, tmp_path, monkeypatch, "quality", "--data", "cifar")
    with pytest.raises(SystemExit, match="no CIFAR-10 without --cifar"):
        run(work, tmp_path, monkeypatch, "levers", "--data", "cifar")
    with pytest.raises(SystemExit, match="does not exist"):
        run(work, tmp_path, monkeypatch, "quality", "--data", "cifar", "--cifar", str(tmp_path / "none.zip"))


@pytest.mark.slow
def test_the_other_parts(work, prepared, tmp_path, monkeypatch):
    short = ["--set", *TINY, "train.steps=7"]
    run(work, tmp_path, monkeypatch, "sampling", "--samples", "64", *short)
    run(work, tmp_path, monkeypatch, "startup", "--repeats", "1", *short)
    only = ["--steps", "7", "--seeds", "2", "--only", "train.learning_rate=0.001", DIT]
    found = run(work, tmp_path, monkeypatch, "levers", *only, *FEW, "--set", *TINY)
    assert {row["sampler"] for row in found["sampling"]["rows"]} == {"euler", "heun", "dpm_solver_pp_2m"}
    assert 0 < found["startup"]["help_seconds"] < found["startup"]["first_step_seconds"]
    assert [row["change"] for row in found["levers"]["rows"]] == ["as it is", "train.learning_rate=0.001", DIT]
    assert all((tmp_path / "bench" / row["picture"]).stat().st_size for row in found["levers"]["rows"])
    assert (tmp_path / "bench" / "sampling.png").exists() and (tmp_path / "bench" / "sampling.csv").exists()


def test_every_precision_of_a_training_has_a_name():
    assert set(report.PRECISION) == set(get_args(TrainParams.model_fields["precision"].annotation))


def test_the_reference_of_a_run_in_tf32_computes_in_float32(tmp_path):
    (tmp_path / "0.png").touch()
    params = inputs.parameters("digits", ROOT, "conditioning=none", "train.precision=tf32")
    assert paired.peer(params, tmp_path).accelerator.mixed_precision == "no"
