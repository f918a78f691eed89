"""The stages `codec` and `encode` under the identity codec: images -> shards of model inputs."""

import json

import numpy as np
import pytest

from tasks.codec import codec
from tasks.download import download
from tasks.encode import encode
from tasks.formats import latents
from tasks.ingest import ingest
from tasks.params import CodecParams, EncodeParams, ImageParams
from tasks.pictures import images
from tasks.runtime import atomic
from tasks.runtime.errors import StageError
from tests.support.data_inputs import contents, folder_params, ingest_params, picture, write_tree

FORM = ImageParams(resolution=8, channels=3)


@pytest.fixture(autouse=True)
def _scratch(tmp_path, monkeypatch):
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))


@pytest.fixture
def encoded(tmp_path):
    """Encode files under the identity codec; returns the folder of the latents."""

    def call(files, conditioning="label", shard_size=16):
        folder = write_tree(tmp_path / "in", files)
        download(tmp_path / "raw", folder_params(folder))
        ingest(tmp_path / "raw", tmp_path / "images", tmp_path / "quarantine", ingest_params())
        accepted = tmp_path / "accepted.json"
        atomic.write_json(accepted, {"verdict": "accepted"})
        codec(
            tmp_path / "images",
            accepted,
            tmp_path / "codec",
            CodecParams(kind="identity", conditioning=conditioning),
            FORM,
        )
        encode(
            tmp_path / "images", accepted, tmp_path / "codec", tmp_path / "latents", EncodeParams(shard_size=shard_size)
        )
        return tmp_path / "latents"

    return call


FILES = {f"{'cat' if seed % 3 else 'dog'}/{seed:02d}.png": picture(seed) for seed in range(50)}


def test_the_inputs_are_the_pixels_and_labels_of_the_images(tmp_path, encoded):
    path = encoded(FILES)
    index = latents.read_index(path)
    assert (index.codec, index.conditioning, index.classes) == ("identity", "label", ["cat", "dog"])
    for split in ("train", "test"):
        samples = images.load_pixels(tmp_path / "images", split, FORM)
        its = latents.load_latents(path, split)
        assert np.array_equal(its.pixels, samples.pixels)
        assert np.array_equal(its.labels, samples.labels)
        assert its.captions is None and its.mean is None
        assert its.classes == 2
        assert its.keys_sha256 == latents.keys_hash(samples.keys)
        assert index.splits[split].count == len(samples.keys)
    assert len(index.splits["train"].shards) == 3


def test_without_a_condition_there_are_no_labels(encoded):
    its = latents.load_latents(encoded(FILES, conditioning="none"), "train")
    assert its.labels is None
    assert its.classes == 0


def test_the_shard_size_changes_no_input(encoded):
    one = latents.load_latents(encoded(FILES, shard_size=7), "train")
    other = latents.load_latents(encoded(FILES, shard_size=1000), "train")
    assert np.array_equal(one.pixels, other.pixels)
    assert np.array_equal(one.labels, other.labels)


def test_the_same_images_give_the_same_bytes(encoded):
    before = contents(encoded(FILES))
    assert contents(encoded(FILES)) == before


def test_one_edited_image_changes_the_digest(encoded):
    before = latents.read_index(encoded(FILES)).digest
    assert latents.read_index(encoded(FILES | {"cat/01.png": picture(1000)})).digest != before


@pytest.mark.parametrize("verdict", [None, {"verdict": "refused"}, {}])
def test_data_that_was_not_accepted_is_not_encoded(tmp_path, encoded, verdict):
    encoded(FILES)
    accepted = tmp_path / "accepted.json"
    accepted.unlink()
    if verdict is not None:
        accepted.write_text(json.dumps(verdict))
    with pytest.raises(StageError, match="accepted"):
        encode(tmp_path / "images", accepted, tmp_path / "codec", tmp_path / "new", EncodeParams())
    assert not (tmp_path / "new").exists()


def test_a_missing_split_and_a_missing_folder_are_named(tmp_path, encoded):
    path = encoded(FILES)
    with pytest.raises(StageError, match="no split 'val'"):
        latents.load_latents(path, "val")
    with pytest.raises(StageError, match="run 'dvc repro encode'"):
        latents.load_latents(tmp_path / "missing", "train")
