"""S3 through a proxy that fails at random: downloads and DVC's push and pull end with equal bytes, or with an error."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tasks.params import DownloadParams
from tasks.runtime.errors import StageError
from tasks.transfer import objects, s3
from tests.support import s3_faults, s3_site
from tests.support.data_inputs import picture

BUCKET = "faulty"


@pytest.fixture(scope="module")
def upstream():
    with s3_site.serving() as address:
        yield address


@pytest.fixture
def bucket(upstream, monkeypatch, tmp_path):
    monkeypatch.setattr(objects, "PAUSE_SECONDS", 0.01)
    with s3_site.bucket(s3_site.client(upstream, monkeypatch, tmp_path), BUCKET) as client:
        yield client


def params(address: str, key: str, pin: str | None = None) -> DownloadParams:
    values = {"source": "folder", "url": f"s3://{BUCKET}/{key}", "sha256": pin, "allow_private_addresses": True}
    return DownloadParams.model_validate(values | {"s3": {"endpoint_url": address, "connections": 4}})


def fill(bucket, count: int) -> None:
    for number in range(count):
        bucket.put_object(Bucket=BUCKET, Key=f"mine/{number}.png", Body=picture(number))


def copied(address: str, pin: str, folder: Path) -> str:
    """Download the prefix; returns the hash of the archive."""
    folder.mkdir()
    s3.copy(folder, params(address, "mine/", pin))
    return hashlib.sha256((folder / "images.zip").read_bytes()).hexdigest()


def pin_of(address: str) -> str:
    with pytest.raises(StageError, match="pin the present content with") as said:
        s3.copy(Path(), params(address, "mine/"))
    return str(said.value).rpartition("=")[2]


def test_the_reader_gets_equal_bytes_through_errors_resets_and_truncation(bucket, upstream, tmp_path):
    fill(bucket, 24)
    pin = pin_of(upstream)
    expected = copied(upstream, pin, tmp_path / "directly")
    with s3_faults.between(upstream, rate=0.2, seed=3) as proxy:
        assert copied(proxy.address, pin, tmp_path / "through") == expected
    assert set(s3_faults.KINDS) <= set(proxy.injected), "every kind of fault occurred"


def test_a_server_that_only_fails_is_one_sentence(bucket, upstream, tmp_path, monkeypatch):
    fill(bucket, 1)
    pin = pin_of(upstream)
    with s3_faults.between(upstream, rate=1.0, seed=0) as proxy, pytest.raises(StageError) as said:
        copied(proxy.address, pin, tmp_path / "never")
    assert str(said.value).count("\n") == 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_downloads_give_no_corrupted_archive(bucket, upstream, tmp_path):
    fill(bucket, 40)
    pin, outcomes = pin_of(upstream), Counter()
    expected = copied(upstream, pin, tmp_path / "directly")
    for seed in range(20):
        with s3_faults.between(upstream, rate=0.1 + 0.02 * seed, seed=seed) as proxy:
            try:
                outcomes["equal" if copied(proxy.address, pin, tmp_path / str(seed)) == expected else "corrupted"] += 1
            except StageError:
                outcomes["refused"] += 1
    print(f"downloads: {dict(outcomes)}")
    assert outcomes["corrupted"] == 0 and outcomes["equal"] >= 10


def dvc(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def work_tree(folder: Path, address: str) -> Path:
    folder.mkdir()
    for command in (
        ("init", "--no-scm", "--quiet"),
        ("remote", "add", "--default", "storage", f"s3://{BUCKET}/dvc"),
        ("remote", "modify", "storage", "endpointurl", address),
        ("remote", "modify", "storage", "verify", "true"),
    ):
        assert dvc(folder, *command).returncode == 0
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "data").iterdir()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_dvc_pushes_and_pulls_no_corrupted_object(bucket, upstream, tmp_path):
    """A push or pull that gives up is repeated, as a person does; none may report success with other bytes."""
    outcomes: Counter[str] = Counter()
    with s3_faults.between(upstream, rate=0.1, seed=1) as proxy:
        here = work_tree(tmp_path / "here", proxy.address)
        (here / "data").mkdir()
        for number in range(60):
            (here / "data" / f"{number}.bin").write_bytes(np.random.default_rng(number).bytes(20_000 + number))
        (here / "data" / "large.bin").write_bytes(np.random.default_rng(99).bytes(20 << 20))  # in several parts
        assert dvc(here, "add", "--quiet", "data").returncode == 0
        _until_done(outcomes, "push", here)
        for stored in bucket.list_objects_v2(Bucket=BUCKET, Prefix="dvc/files/md5/")["Contents"]:
            body = bucket.get_object(Bucket=BUCKET, Key=stored["Key"])["Body"].read()
            name = "".join(stored["Key"].split("/")[-2:]).removesuffix(".dir")
            outcomes["objects"] += 1
            outcomes["corrupted"] += hashlib.md5(body, usedforsecurity=False).hexdigest() != name
        there = work_tree(tmp_path / "there", proxy.address)
        (there / "data.dvc").write_text((here / "data.dvc").read_text())
        _until_done(outcomes, "pull", there)
    print(f"dvc: {dict(outcomes)}; requests: {dict(proxy.injected)}")
    assert outcomes["objects"] == 62 and outcomes["corrupted"] == 0
    assert hashes(there) == hashes(here)


def _until_done(outcomes: Counter[str], command: str, folder: Path) -> None:
    for _ in range(10):
        done = dvc(folder, command)
        outcomes[f"{command} {'done' if done.returncode == 0 else 'gave up'}"] += 1
        if done.returncode == 0:
            return
    pytest.fail(f"{command} never succeeded: {done.stderr[-2000:]}")
