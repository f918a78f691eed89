"""Stable Diffusion XL in small: two text encoders, a pooled embedding, sizes and crop; trained, adapted, exported.

Nothing is downloaded: every part is made here from nothing.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from models.networks.text_encoder import PairedEncoder, load_text_encoder
from models.noise.samplers import Sampling
from models.pipeline import load_pipeline
from tasks.formats import latents
from tasks.params import AutoencoderParams, CodecParams, TextParams
from tests.support import text_inputs
from tests.support.text_inputs import MODEL, run_train
from tests.support.train_inputs import uniform

CODEC = CodecParams(
    kind="autoencoder",
    conditioning="text",
    autoencoder=AutoencoderParams(widths=(8, 16), latent_channels=2, steps=3, batch_size=8, horizontal_flip=True),
    text=TextParams(steps=3, width=32, second_width=48, length=8, words=600),
)
POOLED, WIDTH = 64, 80


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tree(tmp_path_factory, migrated_database):
    """Return the folder in which the stages from `download` to `export` have run, on images of 24 x 16."""
    return text_inputs.through(tmp_path_factory.mktemp("sdxl"), migrated_database, CODEC, (24, 16))


def test_both_encoders_are_trained_and_differ(tree):
    encoder = load_text_encoder(tree / "codec")
    assert isinstance(encoder, PairedEncoder)
    assert (encoder.width, encoder.pooled, encoder.length) == (WIDTH, POOLED, 8)
    text = json.loads((tree / "codec" / "codec.json").read_text())["text"]
    assert (text["width"], text["pooled"], text["length"]) == (WIDTH, POOLED, 8)
    quality = json.loads((tree / "codec" / "quality.json").read_text())
    assert {"text_retrieval_accuracy", "second_text_retrieval_accuracy"} <= quality.keys()


def test_the_embeddings_are_those_of_diffusers(tree):
    from diffusers import StableDiffusionXLPipeline

    theirs = StableDiffusionXLPipeline.from_pretrained(tree / "pipeline", local_files_only=True)
    prompts = ["dark picture of thing 2", "bright picture of thing 1"]
    tokens, nothing, pooled, none_pooled = theirs.encode_prompt(prompts, num_images_per_prompt=1)
    ours = load_text_encoder(tree / "codec").encode([*prompts, ""])
    assert ours.shape == (3, 9, WIDTH)
    assert torch.allclose(ours[:2, :-1], tokens, atol=1e-5)
    assert torch.allclose(ours[:2, -1, :POOLED], pooled, atol=1e-5)
    assert not ours[2].any() and not nothing.any() and not none_pooled.any()


def test_sizes_and_crop_are_stored_with_each_image_and_reach_the_network(tree):
    from tasks.training.batches import Batches, DrawConfig, open_conditioning
    from tasks.training.stores import open_store

    inputs = latents.open_shards(tree / "latents", "train")
    # 24 x 16 pixels, cropped to the central square: 4 columns are cut off on the left.
    assert all((shard["sizes"] == [16, 24, 0, 4, 16, 16]).all() for shard in inputs)
    device = torch.device("cpu")
    conditioning = open_conditioning(tree / "latents", "device", device)
    store = open_store(tree / "latents", "train", "device", device)
    configs = (DrawConfig(batch_size=8, timesteps=uniform(20), seed=0, condition_dropout=p) for p in (0.0, 1.0))
    kept, without = (Batches(store, conditioning, config, device) for config in configs)
    plain, dropped = kept.draw(0).condition, without.draw(0).condition
    for condition in (plain, dropped, kept.conditions(8)):
        assert condition.shape == (8, 9, WIDTH)
        assert condition[:, -1, POOLED : POOLED + 6].tolist() == [[16, 24, 0, 4, 16, 16]] * 8
    assert plain[:, -1, :POOLED].any() and not dropped[:, -1, :POOLED].any() and not dropped[:, :-1].any()
    unet = load_pipeline(tree / "pipeline").network
    x, t = torch.randn(8, 2, 8, 8), torch.full((8,), 10)
    other = plain.clone()
    other[:, -1, POOLED] = 99
    pooled = plain.clone()
    pooled[:, -1, 0] += 1
    with torch.inference_mode():
        for changed in (other, pooled):
            assert not torch.equal(unet(x, t, plain), unet(x, t, changed))


def test_captions_stored_as_tokens_give_the_same_conditions(tree, tmp_path):
    stored, online = text_inputs.batches_of(tree), text_inputs.batches_of(text_inputs.with_tokens(tree, tmp_path))
    assert online.texts.shapes == {"ids": (2, 8)}
    assert torch.allclose(stored.draw(0).condition, online.draw(0).condition, rtol=2**-7, atol=1e-5)
    encoder, captions = load_text_encoder(tree / "codec"), ["a thing", "", "bright picture"]
    online = encoder.encode_ids(encoder.token_ids(captions))
    assert torch.allclose(online, encoder.encode(captions), atol=1e-5) and not online[1].any()


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_diffusers_loads_it_whole_and_draws_the_same(tree, scale):
    theirs, ours = text_inputs.drawn_by_both(tree / "pipeline", "StableDiffusionXLPipeline", scale)
    assert np.abs(theirs - ours).max() < 1e-4
    assert np.ptp(theirs) > 0.05


def test_the_bundle_draws_by_prompt_what_the_pipeline_draws(tree):
    from models.bundle import Bundle

    bundle = Bundle(tree / "onnx")
    for prompts in (["bright picture of thing 3", "something never seen"], ["", "dark picture of thing 4"]):
        draw = {"sampling": Sampling("dpm_solver_pp_2m", 4, guidance_scale=2.0), "prompts": prompts}
        ours = load_pipeline(tree / "pipeline").sample([1, 2], **draw)
        assert np.abs(bundle.sample([1, 2], **draw) - ours).max() < 1e-3
    assert json.loads((tree / "export.json").read_text())["max_abs_difference"] < 1e-4


LORA = MODEL.model_copy(update={"lora_rank": 2})


def weights(folder):
    return load_pipeline(folder).network.state_dict()


def changed_attention(before, after) -> set[str]:
    """Return the names of the weights that differ: attention matrices whose difference has at most rank 2."""
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(".attn" in name and name.endswith(".weight") for name in changed)
    for name in changed:
        assert torch.linalg.matrix_rank(after[name] - before[name], atol=1e-4) <= 2, name
    return changed


def test_a_lora_adapter_changes_attention_only(tree, monkeypatch):
    text_inputs.at_home(tree, monkeypatch)
    run_train(tree, "adapted", LORA, init_from="pipeline", learning_rate=0.5)
    assert changed_attention(weights(tree / "pipeline"), weights(tree / "adapted"))
    prompt = {"prompts": ["dark picture of thing 2"], "sampling": Sampling("ddim", 4)}
    first, adapted = (load_pipeline(tree / name).sample([3], **prompt) for name in ("pipeline", "adapted"))
    assert not np.array_equal(first, adapted)
    added = {"text_embeds": torch.randn(1, POOLED), "time_ids": torch.tensor([[16.0, 24, 0, 4, 16, 16]])}
    assert text_inputs.is_base_with_adapter(tree / "pipeline", tree / "adapted", torch.randn(1, 8, WIDTH), **added)
    newest = max((tree / "scratch" / "train").glob("*/step-*"), key=lambda path: path.stat().st_mtime)
    kept = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    assert kept < (tree / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size


def test_without_base_weights_the_base_is_trained_first_and_a_run_resumes_in_either_phase(tree, monkeypatch):
    text_inputs.at_home(tree, monkeypatch)
    options = {"full_steps": 2, "seed": 5, "ema": ("decay-0.001",), "pipeline_ema": "decay-0.001"}
    run_train(tree, "whole", LORA, steps=5, **options)
    first = weights(tree / "whole")
    shutil.rmtree(tree / "scratch" / "train")
    for steps in (3, 5):  # the learning rate is constant, so a longer run goes on where a shorter one ended
        run_train(tree, f"part-{steps}", LORA, steps=steps, **options)
    assert all(torch.equal(first[name], value) for name, value in weights(tree / "part-5").items())
    base, after = weights(tree / "part-3"), weights(tree / "part-5")
    steps = {name: (after[name] - base[name]).abs().max() for name in base}
    assert max(size for name, size in steps.items() if ".attn" not in name) < 1e-4 < 1e-3 < max(steps.values())
    assert not torch.equal(first["conv_out.weight"], torch.zeros_like(first["conv_out.weight"]))


def test_a_network_of_one_encoder_is_another(tree, tmp_path, monkeypatch):
    """Weights without size conditioning are refused for a network with it."""
    from models.networks.text_unet import TextUNetConfig

    described = json.loads((tree / "pipeline" / "unet" / "config.json").read_text())
    assert described["projection_class_embeddings_input_dim"] == POOLED + 6 * 256
    config = TextUNetConfig.from_diffusers(described)
    assert config.pooled == POOLED and config.to_diffusers() == described
    plain = {name: value for name, value in described.items() if not name.startswith(("addition", "projection"))}
    assert TextUNetConfig.from_diffusers(plain).pooled is None
