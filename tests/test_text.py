"""Conditioning on captions: the text encoder, the stages that use it, and what they refuse."""

import json

import numpy as np
import pytest

from tasks import atomic, latents
from tasks.codec import codec
from tasks.download import download
from tasks.encode import encode
from tasks.ingest import ingest
from tasks.params import CodecParams, EncodeParams, ImageParams
from tasks.stage import StageError
from tests.data_inputs import contents, folder_params, ingest_params, picture, write_tree

FORM = ImageParams(size=8, channels=3)
TEXT = CodecParams(kind="identity", conditioning="text", text_steps=20, text_width=32, seed=0)
FILES = {f"{'cat' if seed % 2 else 'dog'}/{seed:02d}.png": picture(seed) for seed in range(60)}


@pytest.fixture
def through(tmp_path):
    """Take files through download, ingest, codec and encode; returns the folder they lie in."""

    def call(files=FILES, templates=("a {}", "one {} here"), where="first"):
        source, out = write_tree(tmp_path / "in", files), tmp_path / where
        download(out / "raw", folder_params(source))
        ingest(out / "raw", out / "images", out / "aside", ingest_params(caption_templates=templates))
        atomic.write_json(out / "accepted.json", {"verdict": "accepted"})
        codec(out / "images", out / "accepted.json", out / "codec", TEXT, FORM)
        encode(out / "images", out / "accepted.json", out / "codec", out / "latents", EncodeParams(shard_size=1000))
        return out

    return call


def test_captions_become_embeddings(through):
    out = through()
    inputs = latents.load_latents(out / "latents", "train")
    assert inputs.embeddings.shape == (len(inputs.pixels), 2, 32)
    assert inputs.prompts.shape == (3, 32)
    assert json.loads((out / "codec" / "codec.json").read_text())["prompts"] == ["a cat", "a dog"]
    # every image carries both captions of its class, one of which is the class prompt
    kinds = np.unique(inputs.embeddings.reshape(-1, 32), axis=0)
    assert len(kinds) == 4
    distance = np.abs(kinds - inputs.prompts[:, None]).max(axis=2).min(axis=1)
    assert distance[:2].max() < 1e-5 and distance[2] > 0.1
    assert 0.5 < inputs.embeddings.std() < 1.5


def test_the_same_again_gives_the_same_bytes(through):
    first, second = through(), through(where="second")
    assert contents(first / "codec") == contents(second / "codec")
    assert contents(first / "latents") == contents(second / "latents")


def test_images_without_caption_are_named(through):
    with pytest.raises(StageError, match=r"\d+ images have no caption \(.*set ingest.caption_templates"):
        through(templates=())


def test_images_without_class_are_refused(through):
    with pytest.raises(StageError, match="conditioning is 'text', but the images have no classes"):
        through({f"{seed:02d}.png": picture(seed) for seed in range(20)})


def test_training_learns_to_tell_captions_apart(through):
    from models.text_encoder import encode_captions, load_text_encoder

    out = through()
    encoder, tokenizer = load_text_encoder(out / "codec")
    cat, other_cat, dog = encode_captions(encoder, tokenizer, ["a cat", "one cat here", "a dog"])
    assert np.linalg.norm(cat - other_cat) < np.linalg.norm(cat - dog)
