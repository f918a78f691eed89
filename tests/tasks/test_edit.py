"""The stage that edits held-out images: its files, what its numbers say, nothing to do, and continuing after a kill."""

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models import masks
from models.device import emulates_bf16
from models.images.pixels import from_uint8
from tasks.edit import edit
from tasks.editing import measuring
from tasks.editing.drafts import Drafts
from tasks.editing.subjects import Subjects
from tasks.params import EditParams
from tasks.runtime.errors import StageError
from tests.support import cpu, judge_inputs

PARAMS = EditParams(
    n_images=4, strengths=(0.5, 1.0), masks=("half", "strokes"), sampler="ddim", steps=2, guidance_scale=1.5
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return a folder with images, a judge and a random pipeline."""
    root = tmp_path_factory.mktemp("edit")
    judge_inputs.write_images(root)
    judge_inputs.run_judge(root, judge_inputs.BRIEF)
    judge_inputs.write_pipeline(root)
    return root


def run(root, into, params=PARAMS):
    data = root / "data"
    outs = root / into / "edits.json", root / into / "editing"
    edit(root / "outputs" / "pipeline", data / "images", data / "accepted.json", root / "judge", *outs, params)
    return outs


def rows_of(file):
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_it_writes_tables_pictures_and_headline_the_same_every_time(root, monkeypatch):
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(root / "scratch"))
    headline, report = run(root, "first")
    assert {path.name for path in report.iterdir()} == {"strengths.csv", "fills.csv", "strengths.png", "fills.png"}
    strengths, fills = rows_of(report / "strengths.csv"), rows_of(report / "fills.csv")
    assert [row["strength"] for row in strengths] == ["0.5", "1.0"]
    assert float(strengths[0]["psnr"]) > float(strengths[1]["psnr"])
    assert [(row["mask"], row["fill"]) for row in fills] == [
        (mask, fill) for mask in ("half", "strokes") for fill in measuring.FILLS
    ]
    assert {row["known_error"] for row in fills} == {"0"}
    assert all(row["feature_distance"] == "0.0" for row in fills if row["fill"] == "original")
    found = json.loads(headline.read_text())
    assert found["images"] == 4 and found["inpainting"]["half"]["known_error"] == 0
    assert {"strength", "asked_share", "asked_share_ignored"} <= found["image_to_image"].keys()
    again = run(root, "second")
    assert again[0].read_bytes() == headline.read_bytes()
    for path in report.iterdir():
        assert (again[1] / path.name).read_bytes() == path.read_bytes(), path.name
    assert not list((root / "scratch" / "edit").iterdir())


@pytest.mark.skipif(emulates_bf16("cpu"), reason="takes long where bfloat16 is emulated")
def test_edits_in_bfloat16_are_near_those_in_float32_and_never_taken_for_them(root, monkeypatch):
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(root / "precisions"))
    monkeypatch.setattr(Drafts, "discard", lambda drafts: None)
    computed = []
    monkeypatch.setattr(
        measuring,
        "edit",
        lambda model, *rest, real=measuring.edit, **named: (
            computed.append((model.precision, model.network.conv_in.weight.dtype)),
            real(model, *rest, **named),
        )[1],
    )
    exact, lower = (run(root, name, PARAMS.model_copy(update={"precision": name})) for name in ("no", "bf16"))
    assert set(computed) == {("no", torch.float32), ("bf16", torch.bfloat16)}
    first, second = (
        np.stack([np.load(file) for file in sorted(folder.glob("*.npy"))]) / 127.5
        for folder in (root / "precisions" / "edit").iterdir()
    )
    assert 25 < 10 * np.log10(4 / np.mean((first - second) ** 2)) < 100
    assert exact[0].read_bytes() != lower[0].read_bytes()


def test_fp16_needs_a_gpu(root, monkeypatch):
    monkeypatch.setattr("models.device.best_device", lambda: "cpu")
    with pytest.raises(StageError, match=r"edit\.precision 'fp16' needs a GPU; use 'bf16' or 'no'"):
        run(root, "half", PARAMS.model_copy(update={"precision": "fp16"}))


@pytest.mark.parametrize("nothing", [{"n_images": 0}, {"strengths": (), "masks": ()}])
def test_without_anything_to_edit_it_ends_at_once_with_empty_tables(root, nothing):
    with cpu.at_most(1):
        headline, report = run(root, "nothing", PARAMS.model_copy(update=nothing))
    assert json.loads(headline.read_text()) == {"images": 0}
    assert [rows_of(path) for path in sorted(report.iterdir())] == [[], []]


def test_a_killed_run_continues_with_what_it_had_drawn(root, monkeypatch):
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(root / "killed"))
    drawn, real = [], measuring.edit

    def dies_at_the_third(*given, **named):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(given)
        return real(*given, **named)

    monkeypatch.setattr(measuring, "edit", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(root, "continued")
    counted = []
    monkeypatch.setattr(measuring, "edit", lambda *given, **named: counted.append(1) or real(*given, **named))
    headline, report = run(root, "continued")
    assert len(counted) == 2 * 2 + 2 * 2 - 3  # two conditions for each strength and mask
    monkeypatch.setattr(measuring, "edit", real)
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(root / "whole"))
    whole = run(root, "whole")
    assert headline.read_bytes() == whole[0].read_bytes()
    assert all((whole[1] / path.name).read_bytes() == path.read_bytes() for path in report.iterdir())


def test_too_few_held_out_images_are_refused(root, tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.pictures.images.Samples.with_condition", lambda samples, _: np.arange(3))
    with pytest.raises(StageError, match=r"3 held-out images with a label condition are too few .* edit.n_images to 0"):
        run(root, "few")


def bench(tmp_path, conditional=True):
    """Return eight images whose brightness is their class, and a judge that reads it."""
    labels = [number % 4 for number in range(8)]
    pixels = np.stack([np.full((1, 8, 8), 60 * label, np.uint8) for label in labels])
    own, asked = {"labels": labels}, {"labels": [(label + 1) % 4 for label in labels]}
    subjects = Subjects(pixels, own, asked, [""] * 8, pixels, pixels)
    if not conditional:
        subjects = replace(subjects, own={}, asked={})
    judge = SimpleNamespace(
        classifier=True,
        features=lambda images: images.reshape(len(images), -1)[:, :3].astype(np.float32),
        class_logits=lambda images: -np.abs(images.mean(axis=(1, 2, 3))[:, None] - 60 * np.arange(4)),
    )
    model = SimpleNamespace(context_channels=0)
    return measuring.Bench(model, judge, subjects, PARAMS, Drafts(tmp_path / "drafts"))


def follows(model, seeds, images, strength, mask=None, *, labels, **_):
    """An editor that paints what is asked for."""
    painted = from_uint8(np.stack([np.full((1, 8, 8), 60 * label, np.uint8) for label in labels]))
    return painted if mask is None else masks.composite(images, painted, mask, 0)


def ignores(model, seeds, images, strength, mask=None, **_):
    """An editor that gives the image back whatever is asked for."""
    return from_uint8(images)


@pytest.mark.parametrize(("editor", "asked", "own"), [(follows, 1.0, 1.0), (ignores, 0.0, 1.0)])
def test_the_share_as_asked_falls_to_its_control_if_the_condition_is_ignored(tmp_path, monkeypatch, editor, asked, own):
    monkeypatch.setattr(measuring, "edit", editor)
    rows = [row for row, _ in measuring.strengths(bench(tmp_path))]
    assert [(row["asked_share"], row["asked_share_ignored"]) for row in rows] == [(asked, 0.0)] * 2
    fills = {row["fill"]: row for row, _ in measuring.fills(bench(tmp_path)) if row["mask"] == "half"}
    assert fills["model"]["own_share"] == own
    assert (fills["wrong condition"]["psnr"] < 50) == (asked == 1.0)


def test_an_unconditional_model_has_no_shares(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "edit", ignores)
    rows = [row for row, _ in measuring.strengths(bench(tmp_path, conditional=False))]
    fills = [row for row, _ in measuring.fills(bench(tmp_path, conditional=False))]
    assert {row["asked_share"] for row in rows} == {None} and "wrong condition" not in {row["fill"] for row in fills}
    assert measuring.headline(rows, fills, 8).keys() == {"images", "inpainting"}


def test_an_error_outside_the_mask_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "edit", lambda model, seeds, images, *_, **__: from_uint8(images ^ 4))
    errors = {row["fill"]: row["known_error"] for row, _ in measuring.fills(bench(tmp_path))}
    assert errors == {"model": 4, "wrong condition": 4, "mean fill": 0, "copied patch": 0, "original": 0}


def test_simple_fills_use_only_what_is_known():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8), dtype=np.uint8)
    training = np.random.default_rng(1).integers(0, 256, (150, 3, 8, 8), dtype=np.uint8)
    mask = np.stack([masks.half(8, 8), masks.centre(8, 8), masks.strokes(8, 8, 0)])
    wanted = np.stack([training[[7]], training[[70]], training[[149]]])[:, 0]
    hidden = np.where(mask[:, None], pixels, wanted)  # equal to a training image where known
    assert np.array_equal(measuring.nearest_by_known(hidden, mask, training), wanted)
    means = measuring.mean_of_known(pixels, mask)
    assert means[0, 1, 0, 0] == round(float(pixels[0, 1][~mask[0]].mean()))
    assert measuring.psnr(hidden, pixels, mask) == measuring.MAX_PSNR
    assert measuring.psnr(pixels[:1] * 0, pixels[:1] * 0 + 255) == pytest.approx(0)
