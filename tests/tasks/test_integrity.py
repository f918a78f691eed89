"""Damaged and truncated data is refused in one sentence by the stage that opens it, although DVC sees no change."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from models.judges.judge import Judge, JudgeInfo, save_judge
from tasks import params
from tasks.codec import codec
from tasks.download import download
from tasks.encode import encode
from tasks.evaluate import evaluate
from tasks.formats import latents
from tasks.ingest import ingest
from tasks.params import CodecParams, EncodeParams, ImageParams
from tasks.pictures import images
from tasks.runtime import integrity
from tasks.runtime.errors import StageError
from tests.support import judge_inputs
from tests.support.data_inputs import folder_params, ingest_params, picture, write_tree
from tests.support.train_inputs import ROOT, checkpoints, train_here, write_inputs, write_params


@pytest.fixture(autouse=True)
def _scratch(tmp_path, monkeypatch):
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr(integrity, "_compared", {})


def damage(file: Path, count: int = 100) -> None:
    """Change `count` bytes before the end and restore the times of the file, so that `dvc status` sees no change."""
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[-2 * count : -count] = bytes(value ^ 0xFF for value in data[-2 * count : -count])
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


@pytest.mark.parametrize("where", ["train", "texts", "prompts"])
def test_damaged_latents_are_not_opened(tmp_path, where):
    write_inputs(tmp_path, "text", shard_size=30)
    file = next((tmp_path / "latents").glob(f"{where}*.safetensors"))
    latents.load_latents(tmp_path / "latents", "train")
    damage(file, 16)
    with pytest.raises(StageError, match=rf"{file.name} is damaged.*run 'dvc repro -f -s encode'"):
        latents.load_latents(tmp_path / "latents", "train")


def test_truncated_and_missing_latents_are_refused_in_one_sentence(tmp_path):
    write_inputs(tmp_path)
    file = next((tmp_path / "latents").glob("train*.safetensors"))
    os.truncate(file, 200)
    with pytest.raises(StageError, match=rf"{file.name} is damaged.*run 'dvc repro -f -s encode'"):
        latents.open_shards(tmp_path / "latents", "train")
    file.unlink()
    with pytest.raises(StageError, match=rf"{file.name} is missing.*run 'dvc repro -f -s encode'"):
        latents.open_shards(tmp_path / "latents", "train")


@pytest.mark.parametrize("edit", [lambda text: text.replace('"count": 96', '"count": 95'), lambda text: text[:50]])
def test_a_damaged_index_is_named(tmp_path, edit):
    write_inputs(tmp_path)
    index = tmp_path / "latents" / "index.json"
    index.write_text(edit(index.read_text()))
    with pytest.raises(StageError, match=r"index\.json is damaged.*run 'dvc repro -f -s encode'"):
        latents.read_index(tmp_path / "latents")


def test_training_never_starts_on_damaged_latents(tmp_path, monkeypatch, migrated_database):
    write_inputs(tmp_path)
    write_params(tmp_path)
    damage(next((tmp_path / "latents").glob("train*.safetensors")))
    with pytest.raises(StageError, match="is damaged"):
        train_here(tmp_path, monkeypatch, migrated_database)
    assert not checkpoints(tmp_path / "scratch"), "no checkpoint from which a later run would go on"


def test_a_large_data_set_is_verified_once_and_later_damage_is_detected(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    monkeypatch.setattr(integrity, "REMEMBERED_BYTES", 0)
    file = next((tmp_path / "latents").glob("train*.safetensors"))
    latents.open_shards(tmp_path / "latents", "train")
    hashed = []
    original = integrity.file_sha256
    monkeypatch.setattr(integrity, "file_sha256", lambda path: hashed.append(path) or original(path))
    monkeypatch.setattr(integrity, "_compared", {})  # as in another process
    latents.open_shards(tmp_path / "latents", "train")
    assert hashed == []
    damage(file)
    with pytest.raises(StageError, match="is damaged"):
        latents.open_shards(tmp_path / "latents", "train")
    assert hashed == [file]


def test_only_the_first_process_of_a_machine_verifies(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    damage(next((tmp_path / "latents").glob("train*.safetensors")))
    monkeypatch.setenv("LOCAL_RANK", "1")
    latents.open_shards(tmp_path / "latents", "train")


@pytest.fixture
def pictures(tmp_path) -> Path:
    files = {f"{'cat' if seed % 3 else 'dog'}/{seed:02d}.png": picture(seed) for seed in range(40)}
    download(tmp_path / "raw", folder_params(write_tree(tmp_path / "in", files)))
    ingest(tmp_path / "raw", tmp_path / "images", tmp_path / "quarantine", ingest_params())
    (tmp_path / "accepted.json").write_text('{"verdict": "accepted"}')
    return tmp_path


def test_damaged_images_are_not_read(pictures):
    form = ImageParams(resolution=8, channels=3)
    shard = images.shards(pictures / "images")[0]
    damage(shard)
    for read in (
        lambda: images.read_columns(pictures / "images", ["key"]),
        lambda: images.load_pixels(pictures / "images", "train", form),
        lambda: next(images.read_encoded(pictures / "images", ["0" * 64])),
    ):
        with pytest.raises(StageError, match=rf"{shard.name} is damaged.*run 'dvc repro -f -s ingest'"):
            read()


def test_damaged_raw_data_is_not_ingested(pictures):
    file = next(path for path in sorted((pictures / "raw").rglob("*")) if path.suffix in {".tar", ".zip", ".png"})
    damage(file, 20)
    with pytest.raises(StageError, match=rf"{file.name} is damaged.*run 'dvc repro -f -s download'"):
        ingest(pictures / "raw", pictures / "images", pictures / "quarantine", ingest_params())


def test_a_damaged_codec_is_not_used(pictures):
    folder, accepted = pictures / "codec", pictures / "accepted.json"
    codec(pictures / "images", accepted, folder, CodecParams(kind="identity", conditioning="label"), FORM)
    (folder / "vae").mkdir()
    (folder / "vae" / "weights.safetensors").write_bytes(bytes(range(256)))
    document = json.loads((folder / "codec.json").read_text()) | {"files": integrity.checksums(folder, "*/*")}
    (folder / "codec.json").write_text(json.dumps(document))
    damage(folder / "vae" / "weights.safetensors", 20)
    with pytest.raises(StageError, match=r"weights\.safetensors is damaged.*run 'dvc repro -f -s codec'"):
        encode(pictures / "images", accepted, folder, pictures / "latents", EncodeParams())
    (folder / "codec.json").write_text("{")
    with pytest.raises(StageError, match=r"codec\.json is damaged.*run 'dvc repro -f -s codec'"):
        encode(pictures / "images", accepted, folder, pictures / "latents", EncodeParams())


FORM = ImageParams(resolution=8, channels=3)


def test_a_judge_lists_its_files(tmp_path):
    from models.judges.classifier import Classifier

    save_judge(tmp_path, Judge(JudgeInfo(["a", "b"], None, {"channels": 1, "size": 8}, 4), Classifier(1, 8, 2)))
    listed = json.loads((tmp_path / "judge.json").read_text())["files"]
    assert listed == integrity.checksums(tmp_path, "*.safetensors")
    damage(tmp_path / "classifier.safetensors")
    with pytest.raises(StageError, match=r"classifier\.safetensors is damaged.*run 'dvc repro -f -s judge'"):
        integrity.read_described(tmp_path, "judge.json", "judge")


def test_a_damaged_pipeline_is_not_measured(tmp_path):
    folder = judge_inputs.write_pipeline(tmp_path)
    (tmp_path / "accepted.json").write_text('{"verdict": "accepted"}')
    damage(folder / "unet" / "diffusion_pytorch_model.safetensors")
    names = ("outputs/pipeline", "images", "accepted.json", "judge", "averages", "prior")
    names += ("metrics.json", "evaluation", "timing.json")
    with pytest.raises(StageError, match=r"model\.safetensors is damaged.*run 'dvc repro -f -s train'"):
        evaluate(*(tmp_path / name for name in names), params.load(ROOT / "params.yaml").evaluate)


def test_a_damaged_block_of_latents_is_computed_again(tmp_path):
    import torch

    from tasks.encoding.blocks import Blocks

    blocks = Blocks(tmp_path, {"recipe": 1})
    blocks.open()
    blocks.add(["a", "b"], {"mean": torch.arange(512, dtype=torch.bfloat16).reshape(2, 256)})
    assert torch.equal(blocks.take(["b"])["mean"][0], torch.arange(256, 512, dtype=torch.bfloat16))
    (file,) = blocks.folder.glob("*.safetensors")
    damage(file)
    again = Blocks(tmp_path, {"recipe": 1})
    with pytest.raises(StageError, match="was damaged and is removed; run the same command again"):
        again.take(["a"])
    assert Blocks(tmp_path, {"recipe": 1}).missing(["a", "b"]) == ["a", "b"]
