"""Training on shards in an S3 bucket: the batches and weights of local shards, few requests, bounded memory."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from infra.upload_latents import upload
from models.hashing import file_sha256
from tasks.formats import latents
from tasks.runtime.errors import StageError
from tasks.training.batches import Batches, DrawConfig, open_conditioning
from tasks.training.remote import Bucket, Column, open_store
from tests.support import s3_site
from tests.support.train_inputs import WEIGHTS, dvc_tree, environment, results, uniform, write_inputs

NAME = "latents"
ADDRESS = f"s3://{NAME}/of/digits/"


@pytest.fixture(scope="module")
def server():
    with s3_site.serving() as address:
        yield address


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
    """A client of the server with an empty bucket, which the environment names."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    with s3_site.bucket(s3_site.client(server, monkeypatch, tmp_path), NAME) as client:
        yield client


def drawn(folder, remote, **options) -> Batches:
    device = torch.device("cpu")
    conditioning = open_conditioning(folder / "latents", "stream", device, remote=remote)
    store = open_store(folder / "latents", "train", "stream", device, remote=remote)
    config = DrawConfig(batch_size=16, timesteps=uniform(20), seed=1, condition_dropout=0.1, **options)
    return Batches(store, conditioning, config, device)


def equal(a, b) -> bool:
    return all(
        (x is None and y is None) or torch.equal(x, y)
        for x, y in ((getattr(a, name), getattr(b, name)) for name in ("x0", "eps", "t", "condition"))
    )


@pytest.mark.parametrize("conditioning", ["none", "label", "text"])
@pytest.mark.parametrize("connections", [1, 16])
def test_the_batches_are_those_of_local_shards(tmp_path, bucket, monkeypatch, conditioning, connections):
    monkeypatch.setattr("tasks.training.remote.CONNECTIONS", connections)
    write_inputs(tmp_path, conditioning, shard_size=17)
    assert upload(tmp_path / "latents", ADDRESS) == len(list((tmp_path / "latents").glob("*-0*.safetensors")))
    assert upload(tmp_path / "latents", ADDRESS) == 0
    local, remote = drawn(tmp_path, None, parts=2), drawn(tmp_path, Bucket(ADDRESS, 1 << 30), parts=2)
    assert remote.store.where == "streamed from S3"
    for step, part in [(0, 0), (0, 1), (1, 0), (9, 1), (3, 0)]:
        assert equal(local.draw(step, part), remote.draw(step, part))
    for process in range(3):
        several = [drawn(tmp_path, where, process=process, processes=3) for where in (None, Bucket(ADDRESS, 1))]
        assert equal(*(batches.draw(2) for batches in several))


@pytest.mark.slow
def test_a_training_ends_in_the_same_weights(tmp_path, bucket, trained):
    local = trained(tmp_path / "local", "text")
    upload(local / "latents", ADDRESS)
    remote = trained(tmp_path / "remote", "text", data=ADDRESS)
    here, there = results(local), results(remote)
    assert WEIGHTS in here
    del here["report/run.json"], there["report/run.json"]  # which has the parameters, and so the location of the data
    assert here == there
    recorded = [json.loads((folder / "report" / "run.json").read_text()) for folder in (local, remote)]
    assert [record["params"].pop("train.data") for record in recorded] == ["local", ADDRESS]
    assert recorded[0] == recorded[1]


@pytest.mark.slow
def test_dvc_trains_where_only_the_index_and_the_prompts_are_on_disk(tmp_path, bucket, trained, migrated_database):
    """The commands of docs/howto/sizing.md, with a stage `encode` that copies latents."""
    local, whole, bare = (tmp_path / name for name in ("local", "whole", "bare"))
    trained(local, "text")
    upload(local / "latents", ADDRESS)
    made = f"rm -rf data/latents && cp -r {local}/latents data/latents"
    encode = {"cmd": made, "deps": ["data/accepted.json"], "outs": ["data/latents"]}
    dvc_tree(local, whole, encode=encode)
    variables = environment(local, migrated_database) | {"AFTERIMAGE_SCRATCH": str(tmp_path / "bare-scratch")}
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def dvc(folder: Path, *arguments: str) -> str:
        command = [sys.executable, "-m", "dvc", *arguments]
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    few = ["data/latents/index.json", "data/latents/prompts.safetensors"]
    dvc(whole, "repro", "encode")
    dvc(whole, "remote", "add", "--default", "store", str(tmp_path / "store"))
    dvc(whole, "push", *few)
    shutil.copytree(whole, bare, ignore=shutil.ignore_patterns("latents", "cache"))
    params = yaml.safe_load((bare / "params.yaml").read_text())
    params["train"]["data"] = ADDRESS
    (bare / "params.yaml").write_text(yaml.safe_dump(params))
    dvc(bare, "pull", *few)
    output = dvc(bare, "repro", "--allow-missing", "train")
    assert "Stage 'encode' didn't change, skipping" in output and "streamed from S3" in output
    assert sorted(f"data/latents/{file.name}" for file in (bare / "data" / "latents").iterdir()) == few
    assert file_sha256(bare / "outputs" / WEIGHTS) == file_sha256(local / WEIGHTS)


def test_a_block_is_read_once_if_it_fits_and_each_time_if_not(tmp_path, bucket):
    write_inputs(tmp_path, "label", shard_size=17)
    upload(tmp_path / "latents", ADDRESS)
    reads = {}
    for size in (1 << 30, 0):
        remote = Bucket(ADDRESS, size)
        batches = drawn(tmp_path, remote)
        opened = remote.requests
        for step in range(24):  # four epochs of 96 images
            batches.draw(step)
        assert remote._kept_bytes <= size
        reads[size] = remote.requests - opened
    assert reads[1 << 30] == len(latents.shards_of(tmp_path / "latents", "train"))  # of which each is one block
    assert reads[0] > 24


def test_blocks_of_rows_and_whole_columns(tmp_path, bucket):
    """Rows of 192 KB are blocks of their own; labels are read with the header."""
    rows = np.random.default_rng(0).integers(0, 256, (5, 3, 256, 256), np.uint8)
    (tmp_path / "latents").mkdir()
    columns = {"pixels": rows, "labels": np.arange(5)}
    shards = latents.write_shards(
        tmp_path / "latents", "train", 5, lambda part: {name: column[part] for name, column in columns.items()}, 2
    )
    for shard in shards:
        file = tmp_path / "latents" / shard.file
        bucket.upload_file(str(file), NAME, shard.file, ExtraArgs={"Metadata": {"sha256": shard.sha256}})
    remote = Bucket(f"s3://{NAME}", 1 << 30)
    opened = remote.open(shards)
    assert isinstance(opened[0]["pixels"], Column) and opened[0]["pixels"].block_rows == 1
    assert opened[0]["labels"].tolist() == [0, 1]
    before = remote.requests
    (found,) = remote.blocks([(opened[1]["pixels"], 1)] * 3).values()
    assert np.array_equal(found, rows[3:4]) and remote.requests == before + 1


def test_another_shard_and_a_missing_one_are_one_sentence(tmp_path, bucket):
    write_inputs(tmp_path, "label")
    upload(tmp_path / "latents", ADDRESS)
    (shard,) = latents.shards_of(tmp_path / "latents", "train")
    bucket.put_object(Bucket=NAME, Key=f"of/digits/{shard.file}", Body=b"other", Metadata={"sha256": "0" * 64})
    with pytest.raises(StageError, match=r"is not the shard .* upload it with 'python -m infra.upload_latents"):
        drawn(tmp_path, Bucket(ADDRESS, 0))
    bucket.delete_object(Bucket=NAME, Key=f"of/digits/{shard.file}")
    with pytest.raises(StageError, match="does not exist"):
        drawn(tmp_path, Bucket(ADDRESS, 0))


def test_an_object_that_changes_during_the_training_is_refused(tmp_path, bucket):
    write_inputs(tmp_path, "label")
    upload(tmp_path / "latents", ADDRESS)
    batches = drawn(tmp_path, Bucket(ADDRESS, 0))
    (shard,) = latents.shards_of(tmp_path / "latents", "train")
    bucket.put_object(Bucket=NAME, Key=f"of/digits/{shard.file}", Body=bytes(100_000))
    with pytest.raises(StageError, match="was changed"):
        batches.draw(0)


def test_a_broken_connection_is_tried_again(tmp_path, bucket, monkeypatch):
    from botocore.response import StreamingBody
    from urllib3.exceptions import ProtocolError

    monkeypatch.setattr("tasks.transfer.objects.PAUSE_SECONDS", 0)
    write_inputs(tmp_path, "label")
    upload(tmp_path / "latents", ADDRESS)
    remote = Bucket(ADDRESS, 0)
    batches, get, failed, lock = drawn(tmp_path, remote), remote.client.get_object, [], threading.Lock()

    class Broken(io.BytesIO):
        def read(self, *_):
            raise ProtocolError("reset")

    def unreliable(**request):
        with lock:
            breaks = len(failed) < 2
            failed.extend([request] * breaks)
        return {"Body": StreamingBody(Broken(), None)} if breaks else get(**request)

    monkeypatch.setattr(remote.client, "get_object", unreliable)
    assert equal(batches.draw(0), drawn(tmp_path, None).draw(0))
    assert len(failed) == 2
