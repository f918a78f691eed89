"""Pretrained weights from local servers with the APIs of the Hugging Face hub and of S3."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import huggingface_hub.constants as hub_constants
import pytest

from tasks.pretrained import weights
from tasks.runtime.errors import StageError
from tests.support import s3_site
from tests.support.data_inputs import serving
from tests.support.hub_site import COMMIT, publish_model

REPO = "somebody/sdxl"
FILES = {
    "README.md": b"# read me",
    "model_index.json": b"{}",
    "sd_xl_base.safetensors": b"all of it once more",
    "evil.bin": b"a pickle",
    "vae/config.json": b"{}",
    "vae/diffusion_pytorch_model.safetensors": b"vae",
    "vae/diffusion_pytorch_model.fp16.safetensors": b"half of it",
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors": b"much",
    "text_encoder/config.json": b"{}",
    "text_encoder/model.safetensors": b"text",
    "text_encoder/pytorch_model.bin": b"a pickle",
    "tokenizer/vocab.json": b"{}",
    "tokenizer/merges.txt": b"",
}
UNET = "unet/diffusion_pytorch_model"
OF_THE_VAE = {"model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"}


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of this machine with one model, and an empty cache."""
    with serving() as site:
        publish_model(site, REPO, FILES)
        monkeypatch.setattr(hub_constants, "ENDPOINT", site.address)
        resolve = f"{site.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolve)
        monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub_constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield site


def test_only_requested_parts_of_a_repository_are_downloaded_and_never_a_pickle(hub):
    folder = weights.local_folder(REPO, COMMIT, ("vae",))
    assert names(folder) == OF_THE_VAE
    assert (folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == b"vae"
    asked = [path for path, _ in hub.requests]
    assert not any("unet" in path or "sd_xl" in path or path.endswith(".bin") for path in asked)
    both = weights.local_folder(REPO, COMMIT, ("text_encoder", "tokenizer"))
    assert names(both) == OF_THE_VAE | {name for name in FILES if name.startswith("t") and not name.endswith(".bin")}


def test_cached_weights_are_used_without_the_hub(hub, monkeypatch):
    folder = weights.local_folder(REPO, COMMIT, ("vae",))
    before = sum("/resolve/" in path for path, _ in hub.requests)
    assert weights.local_folder(REPO, COMMIT, ("vae",)) == folder
    assert sum("/resolve/" in path for path, _ in hub.requests) == before
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    assert weights.local_folder(REPO, COMMIT, ("vae",)) == folder
    with pytest.raises(StageError, match="its local cache lacks them; set HF_ENDPOINT to a mirror"):
        weights.local_folder("somebody/else", COMMIT, ("vae",))


def test_a_repository_of_one_network_is_its_own_folder(hub):
    publish_model(hub, "somebody/vae", {"config.json": b"{}", "diffusion_pytorch_model.safetensors": b"vae"})
    folder = weights.local_folder("somebody/vae", COMMIT, ("vae",))
    assert weights.part(folder, "vae") == folder
    assert names(folder) == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_refusals_of_the_hub_are_one_sentence_each(hub):
    def refusing(repo: str, status: int, code: str) -> None:
        tree = f"/api/models/{repo}/tree/{COMMIT}?recursive=true&expand=false"
        hub.refusals[tree] = (status, {"X-Error-Code": code})

    refusing("somebody/gated", 403, "GatedRepo")
    refusing("somebody/secret", 401, "RepoNotFound")
    refusing("somebody/moved", 404, "RevisionNotFound")
    refusing("somebody/odd", 400, "")
    publish_model(hub, "somebody/pickled", {"vae/config.json": b"{}", "vae/diffusion_pytorch_model.bin": b"a pickle"})
    for repo, sentence in {
        "somebody/gated": "accept the terms of the repository on the hub and set HF_TOKEN",
        "somebody/secret": "correct the name, or set HF_TOKEN if the repository is private",
        "somebody/moved": f"it has no commit {COMMIT}; correct the pin",
        "somebody/odd": "the hub answered 400",
        "somebody/pickled": "there are no .safetensors files in vae",
    }.items():
        with pytest.raises(StageError, match=sentence) as said:
            weights.local_folder(repo, COMMIT, ("vae",))
        assert repo in str(said.value) and "\n" not in str(said.value)


@pytest.fixture(scope="module")
def s3():
    with s3_site.serving() as address:
        yield address


@pytest.fixture
def bucket(s3, monkeypatch, tmp_path):
    """A bucket with the same model, and credentials for it in the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    client = s3_site.client(s3, monkeypatch, tmp_path)
    client.create_bucket(Bucket="models")
    for name, data in FILES.items():
        client.put_object(Bucket="models", Key=f"sdxl/{name}", Body=data)
    return client


def test_weights_are_downloaded_from_s3_once(bucket):
    pin = hashlib.sha256(b"vae").hexdigest()
    folder = weights.local_folder("s3://models/sdxl", pin, ("vae",))
    assert names(folder) == OF_THE_VAE
    bucket.delete_object(Bucket="models", Key="sdxl/vae/config.json")
    assert weights.local_folder("s3://models/sdxl/", pin, ("vae",)) == folder
    assert names(folder) == OF_THE_VAE


def test_missing_or_other_weights_on_s3_are_one_sentence(bucket):
    with pytest.raises(StageError, match="nothing below s3://models/nothing/"):
        weights.local_folder("s3://models/nothing", "0" * 64, ("vae",))
    with pytest.raises(StageError, match="s3://nowhere/sdxl does not exist"):
        weights.local_folder("s3://nowhere/sdxl", "0" * 64, ("vae",))
    with pytest.raises(StageError, match="and not the pinned"):
        weights.local_folder("s3://models/sdxl", "0" * 64, ("vae",))


def test_the_pin_of_several_networks_covers_each_of_them(bucket):
    hashes = [hashlib.sha256(FILES[f"{name}.safetensors"]).hexdigest() for name in ("text_encoder/model", UNET)]
    pin = hashlib.sha256("".join(hashes).encode()).hexdigest()
    folder = weights.local_folder("s3://models/sdxl", pin, ("text_encoder", "unet"))
    (folder / f"{UNET}.safetensors").write_bytes(b"something else")
    with pytest.raises(StageError, match="and not the pinned"):
        weights.local_folder(str(folder), pin, ("text_encoder", "unet"))


def test_training_starts_from_published_weights(hub, tmp_path, monkeypatch):
    """The whole way: a network that is published is trained on, by its name and commit."""
    from tasks.training.warm_start import initial_folder
    from tests.support.text_inputs import train_params

    params = train_params(weights=REPO, pin=COMMIT)
    folder = initial_folder(params, "unet")
    assert folder is not None
    assert names(folder) == {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert json.loads((folder / "unet" / "config.json").read_text()) == {}
