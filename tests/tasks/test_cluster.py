"""The stages on a Ray cluster: the bytes of one process, with workers that die, and without Ray installed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest

import tasks.ingest as stage_of_ingest
from tasks.encoding import encoder
from tasks.encoding.blocks import Blocks
from tasks.encoding.rows import Missing
from tasks.ingest import ingest
from tasks.ingestion import examining
from tasks.params import EncodeParams, IngestParams
from tasks.pictures.digests import digests
from tasks.pictures.images import read_columns
from tasks.runtime import cluster
from tasks.runtime.errors import StageError
from tests.support.data_inputs import contents, folder_params, ingest_params, picture, write_tree

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 1800
"""A cluster starts in half a minute, on a busy machine in several."""
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (make install EXTRA=ray)")


def test_a_missing_package_is_one_sentence_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(StageError, match="make install EXTRA=ray") as raised, cluster.joined(None, 2, "ingest"):
        pass
    assert "ingest.distributor" in str(raised.value)


def test_a_wrong_address_is_one_sentence(monkeypatch):
    """A stand-in for Ray, whose import and search for a cluster take long."""

    class Ray:
        exceptions = None

        def init(self, **_):
            raise ConnectionError("no cluster")

        def shutdown(self):
            pass

    monkeypatch.setattr(cluster, "_imported", lambda section: Ray())
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    refused = pytest.raises(StageError, match=r"127\.0\.0\.1:9 cannot be used .*encode\.ray_address or RAY_ADDRESS")
    with refused, cluster.joined(None, 2, "encode"):
        pass


def dying_once(function, chunk_of, notes: Path):
    """Return `function`, which notes each chunk that it works on, and whose worker is killed in the second one."""
    died = notes.with_suffix(".died")

    def examine(*arguments, **named):
        name = hashlib.sha256(b"".join(chunk_of(arguments))).hexdigest()
        with notes.open("a") as file:
            file.write(f"{name}\n")
        if len(notes.read_text().splitlines()) > 1:
            with contextlib.suppress(FileExistsError):
                died.touch(exist_ok=False)
                died.write_text(name)
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    return examine


def require_one_chunk_twice(notes: Path, chunks: int) -> None:
    """Assert that of all chunks only that of the killed worker was worked on again."""
    counts = Counter(notes.read_text().splitlines())
    killed = notes.with_suffix(".died").read_text()
    assert len(counts) == chunks
    assert {name for name, count in counts.items() if count > 1} == {killed} and counts[killed] == 2


@pytest.fixture
def raw(tmp_path):
    """A downloaded source of many chunks, with files that cannot be read."""
    from tasks.download import download

    files = {f"{'cat' if seed % 3 else 'dog'}/{seed:04d}.png": picture(seed, (64, 64)) for seed in range(700)}
    files |= {f"cat/bad{seed}.png": picture(seed)[:60] for seed in range(5)}
    download(tmp_path / "raw", folder_params(write_tree(tmp_path / "in", files)))
    return tmp_path / "raw"


@pytest.fixture(scope="module")
def cluster_of_two(tmp_path_factory):
    """Start a Ray cluster of two CPUs in another folder and process; yields its address."""
    options = {"num_cpus": 2, "include_dashboard": False}
    command = [sys.executable, "-c", HOST, repr(options)]
    folder = tmp_path_factory.mktemp("host")
    environment = os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # on the loopback interface
    host = subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    yield host.stdout.readline().decode().strip()
    host.stdin.close()
    host.wait(60)


HOST = """
import ast, sys, ray
print(ray.init(**ast.literal_eval(sys.argv[1])).address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


def ingested(raw: Path, name: str, **params: object) -> dict[str, str]:
    ingest(raw, raw.parent / name, raw.parent / f"{name}-quarantine", ingest_params(shards=16, **params))
    return contents(raw.parent / name) | {f"q/{k}": v for k, v in contents(raw.parent / f"{name}-quarantine").items()}


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
@needs_ray
def test_two_workers_give_the_bytes_of_one_process(raw, cluster_of_two):
    joined = ingested(raw, "joined", workers=2, distributor="ray", ray_address=cluster_of_two)
    assert joined == ingested(raw, "alone", workers=1)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
@needs_ray
def test_a_killed_worker_loses_only_its_chunk(raw, tmp_path, monkeypatch):
    """The other chunks are computed once; here in a cluster that the stage starts."""
    monkeypatch.setattr(stage_of_ingest, "CHUNK_ENTRIES", 64)
    alone = ingested(raw, "alone", workers=1)
    noting = dying_once(examining.examine, lambda arguments: arguments[0], tmp_path / "notes")
    monkeypatch.setattr(examining, "examine", noting)
    assert ingested(raw, "killed", workers=2, distributor="ray") == alone
    require_one_chunk_twice(tmp_path / "notes", chunks=-(-705 // 64))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
@needs_ray
def test_latents_of_two_workers_are_those_of_one_process(to_encode, cluster_of_two):
    require_equal_latents(to_encode, ray_address=cluster_of_two)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
@needs_ray
def test_a_killed_actor_loses_only_its_chunk(to_encode, tmp_path, monkeypatch, cluster_of_two):
    noting = dying_once(
        encoder._encode_chunk, lambda arguments: [image[1] for image in arguments[1][0].images], tmp_path / "notes"
    )
    monkeypatch.setattr(encoder, "_encode_chunk", noting)
    require_equal_latents(to_encode, ray_address=cluster_of_two)
    require_one_chunk_twice(tmp_path / "notes", chunks=4)


@pytest.fixture
def to_encode(tmp_path, monkeypatch):
    """Images of four chunks and an autoencoder; returns the arguments of what encodes them."""
    import torch
    from diffusers import AutoencoderKL

    from tasks.download import download

    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=2, **LEVELS).save_pretrained(
        tmp_path / "vae"
    )
    files = {f"{seed:03d}.png": picture(seed, (20, 16)) for seed in range(200)}
    download(tmp_path / "raw", folder_params(write_tree(tmp_path / "in", files)))
    ingest(tmp_path / "raw", tmp_path / "images", tmp_path / "quarantine", ingest_params())
    return tmp_path


def require_equal_latents(root: Path, chunks: int = 4, **params: object) -> None:
    """Encode on this machine and on a cluster, and assert that the latents are equal."""
    import torch

    hashes = read_columns(root / "images", ["sha256"])["sha256"].to_pylist()
    names = np.unique(digests(hashes))
    missing = Missing(names, np.zeros(len(names), np.int16), [(16, 16)])
    asked = EncodeParams(workers=2, horizontal_flip=True, distributor="ray", **params)
    stored = {}
    for name in ("_encode_missing", "_encode_on_cluster"):
        blocks = Blocks(root / name, {})
        getattr(encoder, name)(root / "images", root / "vae", 3, missing, blocks, asked)
        assert len(contents(root / name)) == chunks
        stored[name] = blocks.take(hashes)
    for name, tensor in stored["_encode_missing"].items():
        assert torch.equal(tensor, stored["_encode_on_cluster"][name])


LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
@needs_ray
def test_a_call_that_kills_every_worker_ends_the_stage(cluster_of_two):
    def die() -> None:
        os._exit(1)

    with pytest.raises(StageError, match="died 4 times"), cluster.joined(cluster_of_two, 2, "ingest") as ray:
        cluster.Tasks(ray).submit(die).result()


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
@needs_ray
def test_an_error_of_a_worker_is_the_error_of_the_stage(cluster_of_two):
    def parse(text: str) -> int:
        return int(text)

    with pytest.raises(ValueError, match="invalid literal"), cluster.joined(cluster_of_two, 1, "ingest") as ray:
        cluster.Tasks(ray).submit(parse, "three").result()


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
@needs_ray
def test_the_cluster_ends_with_a_killed_stage(raw):
    command = [sys.executable, "-c", STAGE, str(raw), str(raw.parent / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    family = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in member.name() for member in family)
    process.kill()
    _, alive = psutil.wait_procs(family, timeout=300)  # two agents of Ray look for its other processes for a minute
    assert not alive, [member.cmdline() for member in alive]


STAGE = """
from tasks.runtime import cluster
import time
with cluster.joined(None, 2, "ingest") as ray:
    print("started", flush=True)
    time.sleep(600)
"""


def test_only_a_known_distributor_is_accepted():
    with pytest.raises(ValueError, match="distributor"):
        IngestParams.model_validate({"shards": 1, "held_out_fraction": 0.2, "distributor": "spark"})
