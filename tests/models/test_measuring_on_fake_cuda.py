"""Judges, autoencoders and text encoders on a stand-in for a GPU: what they compute with, and how they are trained."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from models import autoencoder_training, text_training
from models.judges import classifier, clip, inception, pretrained, selfsupervised
from models.judges.fit import Recipe
from models.judges.judge import Judge, JudgeInfo
from models.networks import autoencoder

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 3, 16, 16), np.uint8)
CAPTIONS = [[f"picture {number % 5}", f"a picture of thing {number}"] for number in range(len(PIXELS))]
LABELS = np.arange(len(PIXELS)) % 3


def test_the_judge_measures(fake_gpu):
    tokenizer = clip.make_tokenizer([text for texts in CAPTIONS for text in texts])
    networks = {
        "classifier": classifier.Classifier(3, 16, 3).eval().to("cuda"),
        "clip": clip.Clip(3, 16, tokenizer.get_vocab_size()).eval().to("cuda"),
    }
    info = JudgeInfo(["a", "b", "c"], None, {"channels": 3, "size": 16}, 24)
    judge = Judge(info, **networks, tokenizer=tokenizer, device="cuda")
    assert judge.features(PIXELS).shape == (24, judge.dimensions)
    assert judge.class_logits(PIXELS).shape == judge.class_logits_of(judge.features(PIXELS)).shape == (24, 3)
    assert judge.clip_image_embeds(PIXELS).shape[1] == judge.clip_text_embeds(["picture", "a thing"]).shape[1]


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_published_networks_measure(fake_gpu, tmp_path, monkeypatch, kind):
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = tower | {"image_size": 8, "patch_size": 4, "projection_dim": 8}
    models = {
        "CLIPModel": lambda: CLIPModel(CLIPConfig(text_config=tower, vision_config=vision, projection_dim=8)),
        "Dinov2Model": lambda: Dinov2Model(Dinov2Config(**tower, image_size=8, patch_size=4)),
    }
    loaded = lambda folder, name, device: models[name]().eval().to(device)  # noqa: E731
    monkeypatch.setattr(pretrained, "_from_pretrained", loaded)
    extractor = pretrained.load_extractor(kind, tmp_path, "cuda")
    assert extractor.features(PIXELS).shape == (24, extractor.dimensions)


def test_inception_measures(fake_gpu):
    network = inception.Inception().eval().to("cuda")
    assert inception.extract(network, PIXELS, "cuda").shape == (24, inception.FEATURES)


AUTOENCODER = autoencoder_training.AutoencoderConfig(channels=3, latent_channels=2, widths=(8, 8), layers_per_block=1)
TEXT = text_training.TextConfig(width=32, layers=1, length=8, words=600)
TRAININGS = {
    "classifier": lambda recipe: classifier.train_classifier(PIXELS, LABELS, 3, recipe),
    "clip": lambda recipe: clip.train_clip(PIXELS, CAPTIONS, recipe),
    "self_supervised": lambda recipe: selfsupervised.train_encoder(PIXELS, recipe),
    "autoencoder": lambda recipe: autoencoder_training.train_autoencoder(PIXELS, AUTOENCODER, recipe),
    "text_encoder": lambda recipe: text_training.train_text_encoder(PIXELS, CAPTIONS, TEXT, recipe),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_no_step_of_a_training_waits(fake_gpu, name):
    recipes = [Recipe(steps, batch_size=8, flip=True, device="cuda") for steps in (2, 4)]
    few, many = (fake_gpu.waits_during(partial(TRAININGS[name], recipe)) for recipe in recipes)
    assert few == many


@pytest.mark.parametrize("lower", ["no", "bf16"])
def test_the_autoencoder_of_a_data_set(fake_gpu, lower):
    network = autoencoder_training.train_autoencoder(PIXELS, AUTOENCODER, Recipe(1, batch_size=8, device="cuda"))
    autoencoder_training.fold_scaling(network, *autoencoder_training.measure_scaling(network, PIXELS))
    mean, std = autoencoder.encode(network, PIXELS, lower)
    assert mean.device.type == std.device.type == "cuda" and mean.dtype == std.dtype == torch.float32
    assert autoencoder.decode(network, mean, lower, memory=10**9).shape == PIXELS.shape
    assert autoencoder.reconstruct(network, PIXELS).shape == PIXELS.shape


@pytest.mark.parametrize("lower", ["no", "bf16"])
def test_the_text_encoder_of_a_data_set(fake_gpu, lower):
    recipe = Recipe(1, batch_size=8, device="cuda")
    encoder, pair = text_training.train_text_encoder(PIXELS, CAPTIONS, TEXT, recipe)
    assert text_training.projected(encoder, pair).model.device.type == "cuda"
    accuracy, _ = text_training.retrieval_accuracy(pair, encoder, PIXELS, CAPTIONS, 0)
    assert 0 <= accuracy <= 1
    assert encoder.encode(["a picture", ""], lower).shape == (2, encoder.length, 32)
