"""S3 through a proxy that fails at random: downloads and DVC's push and pull end with equal bytes, or with an error."""

from __future__ import annotations

import copy
import hashlib
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

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


def dvc(folder: Path, *arguments: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)


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


FILES, RUNS = 2000, 200
MAKE = "import yaml; open('made.txt', 'w').write('made of %d' % yaml.safe_load(open('params.yaml'))['number'])"
LIMIT_SECONDS = 600
"""Of processor time for a push or a pull."""


def _fill_run_cache(folder: Path) -> None:
    """Have DVC's run-cache hold RUNS runs: one that ran, and others that differ in a parameter and an output."""
    from dvc.stage.cache import _get_cache_hash

    stage = {"cmd": f'python -c "{MAKE}"', "params": ["number"], "outs": ["made.txt"]}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"make": stage}}))
    (folder / "params.yaml").write_text("number: 0\n")
    assert dvc(folder, "repro").returncode == 0
    (file,) = (path for path in (folder / ".dvc" / "cache" / "runs").rglob("*") if path.is_file())
    ran = yaml.safe_load(file.read_text())
    for number in range(1, RUNS):
        made = f"made of {number}".encode()
        run, md5 = copy.deepcopy(ran), hashlib.md5(made, usedforsecurity=False).hexdigest()
        run["params"]["params.yaml"]["number"] = number
        run["outs"][0] |= {"md5": md5, "size": len(made)}
        stored = folder / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]
        key = _get_cache_hash(copy.deepcopy(run), key=True)
        entry = folder / ".dvc" / "cache" / "runs" / key[:2] / key / _get_cache_hash(copy.deepcopy(run))
        for path, body in ((stored, made), (entry, yaml.safe_dump(run).encode())):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)


def _timed(folder: Path, *arguments: str, said: str = "") -> float:
    """Run DVC; returns the seconds of processor time of it and its children, which other processes do not change."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    done = dvc(folder, *arguments, timeout=3000)
    assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"dvc {' '.join(arguments)}: {time.monotonic() - started:.0f} s, {used:.0f} s of processor time")
    return used


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_files_and_runs_are_pushed_and_pulled_in_bounded_time(bucket, upstream, tmp_path):
    here = work_tree(tmp_path / "here", upstream)
    (here / "data").mkdir()
    for number in range(FILES):
        (here / "data" / f"{number}.bin").write_bytes(np.random.default_rng(number).bytes(2000))
    assert dvc(here, "add", "--quiet", "data").returncode == 0
    _fill_run_cache(here)
    assert _timed(here, "push", "--run-cache") < LIMIT_SECONDS
    assert _timed(here, "push", "--run-cache") < LIMIT_SECONDS, "a push of nothing new"
    there = work_tree(tmp_path / "there", upstream)
    for name in ("data.dvc", "dvc.yaml", "dvc.lock"):
        shutil.copy(here / name, there / name)
    (there / "params.yaml").write_text("number: 0\n")
    assert _timed(there, "pull", "--run-cache") < LIMIT_SECONDS
    assert hashes(there) == hashes(here)
    runs = [path for path in (there / ".dvc" / "cache" / "runs").rglob("*") if path.is_file()]
    assert len(runs) == RUNS
    for left in (there / ".dvc" / "cache", there / "dvc.lock", there / "made.txt"):  # as after a clone of the code
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    assert _timed(there, "repro", "--pull", "make", said="is cached - skipping run") < LIMIT_SECONDS
    assert (there / "made.txt").read_text() == "made of 0"
