"""The command that draws: the images of the model, its files, and wrong options refused in one sentence."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.bundle import Bundle
from models.device import emulates_bf16
from models.editing import edit
from models.images.pixels import to_uint8
from models.noise.samplers import Sampling
from models.pipeline import load_pipeline
from tasks.drawing.options import Options
from tasks.drawing.run import run
from tasks.drawing.settings import read_settings
from tasks.runtime.errors import StageError
from tests.support import model_outputs

SETTINGS = {"sampler": "ddim", "steps": 4, "guidance": 1.5}


@pytest.fixture
def tree(exported, tmp_path, monkeypatch) -> Path:
    """A work tree with a pipeline, in which the command runs."""
    (tmp_path / "outputs").mkdir()
    for name in ("pipeline", "onnx"):
        (tmp_path / "outputs" / name).symlink_to(exported / "outputs" / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    return tmp_path


def pixels(file: str | Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def test_the_same_seeds_give_the_images_of_the_pipeline_and_of_the_bundle(tree):
    run(Options(**SETTINGS, label=["dog", "2"], seed=[3, 7], out=Path("drawn")))
    sampling, seeds, labels = Sampling("ddim", 4, guidance_scale=1.5), [3, 3, 7, 7], [1, 2, 1, 2]
    drawn = np.stack([pixels(f"drawn/{index:04d}.png") for index in range(4)])[:, None]
    assert np.array_equal(drawn, to_uint8(load_pipeline(Path("outputs/pipeline")).sample(seeds, labels, sampling)))
    bundled = to_uint8(Bundle(Path("outputs/onnx")).sample(seeds, labels, sampling))
    assert np.abs(drawn.astype(int) - bundled).max() <= 1
    assert len({image.tobytes() for image in drawn}) == 4


def test_a_png_contains_its_settings_and_is_drawn_again_from_them(tree):
    run(Options(**SETTINGS, prompt=["a photo of a cat"], count=3, out=Path("first.png")))
    stored = json.loads(Image.open("first.png").text["afterimage"])
    assert stored["prompts"] == ["a photo of a cat"] and stored["seeds"] == [0, 1, 2] and stored["steps"] == 4
    assert stored["train_key"] == "a" * 64 and "eta" not in stored
    run(Options(like=Path("first.png"), out=Path("again.png")))
    assert Path("again.png").read_bytes() == Path("first.png").read_bytes()
    run(Options(like=Path("first.png"), guidance=3.0, seed=[1], out=Path("other.png")))
    changed = read_settings(Path("other.png"))
    assert (changed.guidance, changed.seeds, changed.sampler) == (3.0, (1,), "ddim")
    assert pixels("other.png").shape == (8, 8)


@pytest.mark.skipif(emulates_bf16("cpu"), reason="takes long where bfloat16 is emulated")
def test_the_precision_is_a_setting(tree):
    chosen = {**SETTINGS, "label": ["cat"], "seed": [1]}
    run(Options(**chosen, out=Path("exact.png")))
    run(Options(**chosen, precision="bf16", out=Path("lower.png")))
    assert "precision" not in json.loads(Image.open("exact.png").text["afterimage"])
    assert read_settings(Path("lower.png")).precision == "bf16"
    exact, lower = (pixels(f"{name}.png") / 127.5 for name in ("exact", "lower"))
    assert 25 < 10 * np.log10(4 / np.mean((exact - lower) ** 2)) < 100
    run(Options(like=Path("lower.png"), out=Path("again.png")))
    assert Path("again.png").read_bytes() == Path("lower.png").read_bytes()
    with pytest.raises(StageError, match="--precision 'fp16' needs a GPU; use 'bf16' or 'no'"):
        run(Options(**chosen, precision="fp16", out=Path("half.png")))


def test_without_options_it_draws_each_class_as_the_model_was_evaluated(tree, capsys):
    model_outputs.write_reports(tree)
    run(Options())
    assert "20 steps, guidance 1)" in capsys.readouterr().out  # an evaluation of other weights
    report = tree / "reports" / "train" / "run.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"train_key": "a" * 64}))
    run(Options())
    assert "wrote outputs/drawings/0002.png (3 images, ddim, 5 steps, guidance 1.5)" in capsys.readouterr().out
    assert read_settings(Path("outputs/drawings/0002.png")).labels == (0, 1, 2)


@pytest.mark.parametrize("name", ["steps.gif", "steps.webp"])
def test_an_animation_has_a_frame_for_each_step_and_ends_with_the_images(tree, name):
    run(Options(**SETTINGS, label=["cat"], seed=[1, 2], out=Path(name)))
    run(Options(**SETTINGS, label=["cat"], seed=[1, 2], out=Path("last.png")))
    with Image.open(name) as animation:
        assert animation.n_frames == 4
        animation.seek(3)
        shown = np.asarray(animation.convert("L")).astype(int)
    last = np.asarray(Image.open("last.png").convert("RGBA"))
    assert np.abs(shown - last[..., 0])[last[..., 3] > 0].max() <= 2


def given() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (8, 8), np.uint8)


def test_an_image_is_changed_by_strength_and_by_a_mask(tree, capsys):
    Image.fromarray(given()).save("given.png")
    Image.fromarray(given()).convert("RGB").resize((48, 32)).save("wide.jpg")
    Image.fromarray((np.arange(64) < 32).reshape(8, 8)).save("mask.png")
    one = {**SETTINGS, "label": ["dog"], "seed": [2], "image": Path("given.png")}
    run(Options(**one, strength=0.5, out=Path("half.png")))
    run(Options(**one, mask=Path("mask.png"), out=Path("top.png")))
    run(Options(**one, mask_rectangle="0,0,8,4", out=Path("same.png")))
    pipeline, settings = load_pipeline(Path("outputs/pipeline")), Sampling("ddim", 4, guidance_scale=1.5)
    wanted = to_uint8(edit(pipeline, [2], given()[None, None], 0.5, labels=[1], sampling=settings))[0, 0]
    assert np.array_equal(pixels("half.png"), wanted)
    assert np.array_equal(pixels("top.png"), pixels("same.png"))
    assert np.array_equal(pixels("top.png")[4:], given()[4:]) and not np.array_equal(pixels("top.png"), given())
    assert "was brought" not in capsys.readouterr().out
    run(Options(**one | {"image": Path("wide.jpg"), "seed": [2, 3]}, out=Path("wide")))
    assert capsys.readouterr().out.count("wide.jpg was brought from 48 x 32 to 8 x 8 pixels") == 1
    run(Options(like=Path("top.png"), out=Path("again.png")))
    assert Path("again.png").read_bytes() == Path("top.png").read_bytes()
    Image.fromarray(255 - given()).save("given.png")
    with pytest.raises(StageError, match=r"given\.png is not the file that top\.png was drawn from; give --image$"):
        run(Options(like=Path("top.png"), out=Path("other.png")))


def test_a_file_that_exists_is_kept_without_force(tree):
    Path("picture.png").write_bytes(b"mine")
    with pytest.raises(StageError, match=r"picture.png exists; choose another name, or add --force to overwrite$"):
        run(Options(**SETTINGS, out=Path("picture.png")))
    assert Path("picture.png").read_bytes() == b"mine"
    run(Options(**SETTINGS, out=Path("picture.png"), force=True))
    assert pixels("picture.png").ndim == 3
    assert not list(tree.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"label": ["bird"]}, "label 'bird' is no class of this model; labels must lie between 0 and 2 (hot dog"),
        ({"label": ["7"]}, "labels must lie between 0 and 2"),
        ({"prompt": ["a bird"]}, "names no class"),
        ({"negative_prompt": "ugly"}, "a negative prompt needs a text-conditional model"),
        ({"sampler": "euler"}, "a diffusion model has no sampler 'euler'"),
        ({"sampler": "plms"}, "unknown sampler 'plms'"),
        ({"steps": 21}, "sampling steps 21"),
        ({"eta": 2.0}, "eta 2 is not valid"),
        ({"seed": [-1]}, "must be one or more integers from 0 on"),
        ({"count": 2000}, "6000 images are more than 4096"),
        ({"mask_rectangle": "0,0,2,2"}, "a mask changes an image; give --image"),
        ({"strength": 0.5}, "a strength changes an image; give one"),
        ({"image": Path("given.png"), "strength": 0.0}, "strength 0 must lie above 0 and not above 1"),
        ({"image": Path("given.png"), "strength": 0.01}, "strength 0.01 takes none of 20 steps"),
        ({"image": Path("given.png"), "mask": Path("other.png")}, "the mask is 6 x 4 pixels and the image 8 x 8"),
        ({"image": Path("given.png"), "mask_rectangle": "6,0,4,4"}, "is empty or leaves the image of 8 x 8 pixels"),
        ({"image": Path("given.png"), "mask_rectangle": "1,2"}, "must be four integers, LEFT,TOP,WIDTH,HEIGHT"),
        ({"control": Path("given.png")}, "this model has no ControlNet and takes no control"),
        ({"control_from": Path("given.png")}, "needs a model whose ControlNet was trained here; give --control"),
        ({"control_scale": 0.5}, "a control scale weighs a control map; give one"),
        ({"image": Path("no.png")}, "--image no.png cannot be read (No such file or directory)"),
        ({"image": Path("text.png")}, "the image cannot be read (not an image"),
        ({"lora": ["outputs:0.5"]}, "--lora outputs holds no pytorch_lora_weights.safetensors"),
        ({"lora": ["outputs:half"]}, "write FOLDER:WEIGHT"),
        ({"model": "nowhere"}, "--model nowhere is no folder"),
        ({"model": "outputs"}, "--model outputs holds no"),
        ({"model": "models:/digits"}, "write models:/NAME@ALIAS or models:/NAME/VERSION"),
        ({"like": Path("nothing.png")}, "--like nothing.png is no file"),
        ({"out": Path("picture.jpg")}, "must end in .png, .gif, .webp, or be a folder"),
        ({"out": Path("no/folder/picture.png")}, "which is no folder"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_sentence(tree, options, complaint):
    Image.fromarray(given()).save("given.png")
    Image.new("L", (6, 4)).save("other.png")
    Path("text.png").write_text("no image")
    with pytest.raises(StageError, match=re.escape(complaint)) as refused:
        run(Options(**options))
    assert "\n" not in str(refused.value)
    assert not (tree / "outputs" / "drawings").exists()


def test_an_unconditional_model_takes_no_label(exported_unconditional, tmp_path):
    model = str(exported_unconditional / "outputs" / "pipeline")
    run(Options(model=model, seed=[4], steps=3, out=tmp_path / "one.png"))
    assert pixels(tmp_path / "one.png").shape == (8, 8)
    with pytest.raises(StageError, match="this model is unconditional; ask for images without label or prompt"):
        run(Options(model=model, label=["0"], out=tmp_path / "two.png"))


def test_a_damaged_model_and_a_png_without_settings_are_refused(tree):
    shutil.copytree("outputs/pipeline", "copy")
    weights = Path("copy/unet/diffusion_pytorch_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(StageError, match=r"is damaged: .* was recorded; copy or fetch the folder again$"):
        run(Options(model="copy"))
    Image.new("L", (2, 2)).save("plain.png")
    with pytest.raises(StageError, match=r"--like plain\.png holds no settings"):
        run(Options(like=Path("plain.png")))
