"""A ControlNet in the chain: maps beside the latents, training in two phases, and diffusers' pipeline of the result."""

from __future__ import annotations

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from models.networks import control_maps as control
from models.networks.control_maps import ControlSpec
from models.noise.samplers import Sampling, SeededNoise
from models.pipeline import load_pipeline
from tasks.drawing.options import Options
from tasks.drawing.run import run
from tasks.encode import encode
from tasks.formats import latents
from tasks.params import AutoencoderParams, CodecParams, ControlParams, EncodeParams, TextParams
from tasks.runtime.errors import StageError
from tests.support import text_inputs
from tests.support.text_inputs import MODEL, run_train

CODEC = CodecParams(
    kind="autoencoder",
    conditioning="text",
    autoencoder=AutoencoderParams(widths=(8, 16), latent_channels=2, steps=3, batch_size=8, horizontal_flip=True),
    text=TextParams(steps=3, width=32, length=8, words=600),
)
CANNY = ControlParams(kind="canny", canny_low=50, canny_high=100)
CONTROLLED = MODEL.model_copy(update={"control_widths": (4, 6)})
PHASES = {"steps": 6, "full_steps": 2, "control_dropout": 0.1, "checkpoint_every": 1}
PROMPT, SAMPLING = "dark picture of thing 2", Sampling("ddim", 5)


@pytest.fixture(scope="module")
def tree(tmp_path_factory, migrated_database):
    """Return the folder in which the stages up to `train` have run; the U-Net is trained first, for 2 of 6 steps."""
    root = text_inputs.through(tmp_path_factory.mktemp("control"), migrated_database, CODEC, control=CANNY)
    with pytest.MonkeyPatch.context() as patch:
        text_inputs.at_home(root, patch)
        run_train(root, "pipeline", CONTROLLED, **PHASES)
    return root


@pytest.fixture
def maps(tree) -> np.ndarray:
    """Control maps of two held-out images, uint8 [2, 1, 16, 16]."""
    return latents.open_shards(tree / "latents", "test")[0]["control"][:2]


def test_the_maps_are_opencvs_edges_and_lie_beside_the_latents(tree):
    from tasks.params import ImageParams
    from tasks.pictures.images import load_pixels

    images = load_pixels(tree / "images", "test", ImageParams(resolution=16, channels=3)).pixels
    stored = np.concatenate([shard["control"] for shard in latents.open_shards(tree / "latents", "test")])
    greys = [cv2.cvtColor(np.ascontiguousarray(image.transpose(1, 2, 0)), cv2.COLOR_RGB2GRAY) for image in images]
    assert np.array_equal(stored[:, 0], [cv2.Canny(grey, 50, 100) for grey in greys])
    assert set(np.unique(stored)) == {0, 255}
    index = json.loads((tree / "latents" / "index.json").read_text())
    assert index["control"] == {"kind": "canny", "canny_low": 50.0, "canny_high": 100.0, "colour_cells": 8}


def test_other_maps_are_another_data_set_and_known_ones_are_not_made_again(tree, monkeypatch, capsys):
    text_inputs.at_home(tree, monkeypatch)

    def encoded(params: ControlParams | None, name: str) -> str:
        options = EncodeParams(shard_size=20, horizontal_flip=True, control=params)
        encode(tree / "images", tree / "accepted.json", tree / "codec", tree / name, options)
        return latents.read_index(tree / name).digest

    first = encoded(CANNY, "again")
    assert "encode: 0 control maps to make" in capsys.readouterr().out
    assert first == latents.read_index(tree / "latents").digest
    colour = encoded(ControlParams(kind="colour", colour_cells=4), "colour")
    assert "changed since the last time: control; all control maps are made anew" in capsys.readouterr().out
    assert latents.open_shards(tree / "colour", "train")[0]["control"].shape[1:] == (3, 4, 4)
    assert len({first, colour, encoded(None, "none")}) == 3
    assert "control" not in json.loads((tree / "none" / "index.json").read_text())


def test_a_batch_has_maps_mirrored_with_their_images_and_dropped_at_random(tree):
    from tasks.training.batches import Batches, DrawConfig, open_conditioning
    from tasks.training.stores import open_store
    from tests.support.train_inputs import uniform

    device = torch.device("cpu")
    store = open_store(tree / "latents", "train", "device", device)
    conditioning = open_conditioning(tree / "latents", "device", device)

    def drawn(**options) -> torch.Tensor:
        config = DrawConfig(batch_size=32, timesteps=uniform(20), seed=0, **options)
        return Batches(store, conditioning, config, device).draw(0).control

    plain, mirrored = drawn(control_dropout=0.0), drawn(control_dropout=0.0, horizontal_flip=True)
    dropped = drawn(control_dropout=0.5)
    assert drawn() is None
    assert plain.shape == (32, 3, 16, 16) and set(plain.unique().tolist()) == {0.0, 1.0}
    flipped = [torch.equal(one, other.flip(2)) for one, other in zip(mirrored, plain, strict=True)]
    kept = [torch.equal(one, other) for one, other in zip(mirrored, plain, strict=True)]
    assert all(a or b for a, b in zip(flipped, kept, strict=True)) and 5 < sum(flipped) < 27
    empty = [not map_.any() for map_ in dropped]
    assert 5 < sum(empty) < 27
    assert all(none or torch.equal(one, other) for none, one, other in zip(empty, dropped, plain, strict=True))


def weights(folder) -> dict[str, torch.Tensor]:
    return load_pipeline(folder).network.state_dict() | {
        f"control.{name}": value for name, value in load_pipeline(folder).control.state_dict().items()
    }


def test_the_u_net_stays_as_it_is_while_the_control_net_is_trained_and_a_run_resumes_in_either_phase(tree, monkeypatch):
    text_inputs.at_home(tree, monkeypatch)
    whole = weights(tree / "pipeline")
    shutil.rmtree(tree / "scratch" / "train")
    for steps in (3, 6):  # the learning rate is constant, so a longer run goes on where a shorter one ended
        run_train(tree, f"part-{steps}", CONTROLLED, **PHASES | {"steps": steps})
    before, after = (weights(tree / f"part-{steps}") for steps in (3, 6))
    assert all(torch.equal(whole[name], value) for name, value in after.items())
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert moved and all(name.startswith("control.") for name in moved)
    assert "control.controlnet_mid_block.weight" in moved and "control.down_blocks.0.resnets.0.conv1.weight" in moved
    assert whole["conv_out.weight"].any()


def test_from_given_weights_only_the_control_net_is_trained_and_it_can_be_trained_further(tree, monkeypatch):
    text_inputs.at_home(tree, monkeypatch)
    before = weights(tree / "pipeline")
    run_train(tree, "further", CONTROLLED, init_from="pipeline", control_dropout=0.0, learning_rate=0.001, steps=2)
    after = weights(tree / "further")
    unet = [name for name in before if not name.startswith("control.")]
    assert all(torch.equal(before[name], after[name]) for name in unet)
    assert (
        before["control.controlnet_mid_block.weight"] - after["control.controlnet_mid_block.weight"]
    ).abs().max() < 0.01
    newest = max((tree / "scratch" / "train").glob("*/step-*"), key=lambda path: path.stat().st_mtime)
    assert "conv_out.weight" not in _names(newest / "model.safetensors")


def _names(file) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return list(opened.keys())


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_diffusers_loads_it_whole_and_draws_the_same(tree, maps, scale):
    from diffusers import DDIMScheduler, DiffusionPipeline

    theirs = DiffusionPipeline.from_pretrained(tree / "pipeline", local_files_only=True)
    assert type(theirs).__name__ == "StableDiffusionControlNetPipeline"
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, set_alpha_to_one=True)
    ours = load_pipeline(tree / "pipeline")
    for network in (theirs.controlnet, ours.control):  # so that the maps have an effect to compare
        torch.manual_seed(0)
        for block in (*network.controlnet_down_blocks, network.controlnet_mid_block):
            torch.nn.init.normal_(block.weight)
    noise = torch.from_numpy(SeededNoise([7], (2, 8, 8))())
    options = {"height": 16, "width": 16, "output_type": "np", "eta": 0.0, "num_inference_steps": 5}
    image = control.as_input(torch.from_numpy(np.array(maps[:1])), 16, 16)
    drawn = theirs(
        PROMPT, image=image, latents=noise, guidance_scale=scale, controlnet_conditioning_scale=0.8, **options
    )
    sampling = Sampling("ddim", 5, guidance_scale=scale)
    draw = {"sampling": sampling, "prompts": [PROMPT], "control_scale": 0.8}
    own = ours.sample([7], control=maps[:1], **draw)
    assert np.abs(drawn.images[0].transpose(2, 0, 1) - np.clip((own[0] + 1) / 2, 0, 1)).max() < 1e-4
    assert np.abs(own - ours.sample([7], **draw)).max() > 1e-2


def test_the_command_draws_with_a_map_and_with_one_that_it_makes(tree, maps, tmp_path, monkeypatch):
    from models.images.pixels import to_uint8

    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 16, 16), np.uint8)
    Image.fromarray(image[0].transpose(1, 2, 0)).save(tmp_path / "image.png")
    Image.fromarray(maps[0, 0]).save(tmp_path / "map.png")
    once = {"model": str(tree / "pipeline"), "prompt": [PROMPT], "seed": [7], "sampler": "ddim", "steps": 5}
    draw = {"sampling": SAMPLING, "prompts": [PROMPT], "control_scale": 3.0}
    model, made = load_pipeline(tree / "pipeline"), control.edges(image, 50, 100)
    for option, file, used in (("control", "map.png", maps[:1]), ("control_from", "image.png", made)):
        out = tmp_path / f"{option}.png"
        run(Options(**once, **{option: tmp_path / file}, control_scale=3.0, out=out))
        wanted = to_uint8(model.sample([7], control=used, **draw))[0].transpose(1, 2, 0)
        assert np.array_equal(np.asarray(Image.open(out)), wanted)
    with pytest.raises(StageError, match="a control map and an image to begin with cannot be combined"):
        run(Options(**once, control=tmp_path / "map.png", image=tmp_path / "image.png", out=tmp_path / "no.png"))


def test_controls_that_do_not_fit(tree, maps, monkeypatch):
    from dataclasses import replace

    model = load_pipeline(tree / "pipeline")
    draw = {"sampling": SAMPLING, "prompts": [PROMPT, PROMPT]}
    plain = model.sample([1, 2], **draw)
    assert np.array_equal(plain, replace(model, control=None).sample([1, 2], **draw))
    with pytest.raises(ValueError, match="this model has no ControlNet and takes no control"):
        replace(model, control=None).sample([1, 2], control=maps, **draw)
    larger = maps.repeat(2, axis=2).repeat(2, axis=3)
    with pytest.warns(UserWarning, match="the control is 32 x 32 pixels and is resized to 16 x 16") as said:
        model.sample([1, 2], control=larger, batch_size=1, **draw)
    assert len(said) == 1
    with pytest.raises(ValueError, match=r"the control is uint8 \[3, 1, 16, 16\]; give uint8 \[2"):
        model.sample([1, 2], control=maps[[0, 1, 0]], **draw)
    with pytest.raises(ValueError, match=r"the control is float64 \[2, 1, 16, 16\]; give uint8"):
        model.sample([1, 2], control=maps / 255, **draw)
    one_for_all = model.sample([1, 2], control=maps[:1], **draw)
    assert np.allclose(one_for_all, model.sample([1, 2], control=maps[[0, 0]], batch_size=1, **draw), atol=1e-5)


def test_agreement_of_an_image_with_its_own_map_and_with_another():
    random = np.random.default_rng(0)
    images = random.integers(0, 2, (2, 3, 4, 4), np.uint8).repeat(8, axis=2).repeat(8, axis=3) * 255
    for spec in (ControlSpec("canny"), ControlSpec("colour", colour_cells=4)):
        maps = control.maps_of(spec, images)
        assert control.agreement(spec, maps, images) == pytest.approx([1, 1])
        assert (control.agreement(spec, maps, images[::-1]) < 0.9).all()
    own = control.agreement(ControlSpec("own"), images, images)
    assert own == pytest.approx([1, 1])


def test_an_edge_counts_within_a_pixel():
    line = np.zeros((8, 8), bool)
    line[:, 3] = True
    shifted = {n: np.roll(line, n, axis=1) for n in range(3)}
    assert [control.edge_f1(line, shifted[n], tolerance=0.1) for n in range(3)] == [1, 1, 0]
    assert [control.edge_f1(line, shifted[n]) for n in range(3)] == [1, 0, 0]  # a pixel is a lot at this resolution
    large = np.kron(line, np.ones((8, 8), bool)) & (np.arange(64) % 8 == 0)
    assert [control.edge_f1(large, np.roll(large, n, axis=1)) for n in range(3)] == [1, 1, 0]
    half = line.copy()
    half[4:] = False
    assert control.edge_f1(line, half, tolerance=0) == pytest.approx(2 / 3)
    assert control.edge_f1(line, np.zeros_like(line)) == 0 and control.edge_f1(line & False, line & False) == 1
