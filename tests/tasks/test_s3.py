"""The source `folder` at s3:// URLs, against a local S3 server (moto)."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest

from tasks.download import download
from tasks.ingest import ingest
from tasks.params import DownloadParams
from tasks.runtime.errors import StageError
from tasks.transfer import objects, s3
from tests.support import s3_site
from tests.support.data_inputs import ROOT, cutting, ingest_params, picture, random_cuts, write_params, write_zip

BUCKET = "pictures"


@pytest.fixture(scope="module")
def server():
    with s3_site.serving() as address:
        yield address


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
    """An empty bucket, and credentials for it in the environment."""
    monkeypatch.setattr(objects, "PAUSE_SECONDS", 0.01)
    with s3_site.bucket(s3_site.client(server, monkeypatch, tmp_path), BUCKET) as client:
        yield client


def params(server, key="", sha256=None, **others):
    values = {"source": "folder", "url": f"s3://{BUCKET}/{key}", "sha256": sha256, "allow_private_addresses": True}
    return DownloadParams.model_validate(values | {"s3": {"endpoint_url": server, "connections": 4}} | others)


def put(client, key, data, **others):
    client.put_object(Bucket=BUCKET, Key=key, Body=data, **others)


def pin_of(server, key=""):
    """What the stage says when nothing is pinned."""
    with pytest.raises(StageError, match="pin the present content with") as said:
        s3.copy(None, params(server, key))
    return str(said.value).rpartition("=")[2]


def sha256_of(data):
    return hashlib.sha256(data).hexdigest()


def noise(size, seed=0):
    return np.random.default_rng(seed).bytes(size)


def test_an_archive_is_copied_unchanged(bucket, server, tmp_path):
    data = write_zip(tmp_path / "a.zip", {"cat/1.png": picture(1), "dog/2.png": picture(2)}).read_bytes()
    put(bucket, "sets/a.zip", data)
    download(tmp_path / "raw", params(server, "sets/a.zip", sha256_of(data)))
    assert (tmp_path / "raw" / "images.zip").read_bytes() == data
    said = json.loads((tmp_path / "raw" / "manifest.json").read_text())
    assert said["origin"] == f"s3://{BUCKET}/sets/a.zip"
    assert not list((tmp_path / "scratch" / "downloads").glob("s3-*[!k]"))


def test_objects_below_a_prefix_become_one_archive(bucket, server, tmp_path):
    files = {"cat/1.png": picture(1), "cat/2.png": picture(2), "dog/3.png": picture(3)}
    for name, data in files.items():
        put(bucket, f"mine/{name}", data)
    put(bucket, "mine/empty/", b"")
    put(bucket, "other/4.png", picture(4))
    put(bucket, "mine/captions.csv", b"image,caption\ncat/1.png,a cat\n")
    asked = params(server, "mine/", pin_of(server, "mine/"))
    download(tmp_path / "raw", asked)
    with zipfile.ZipFile(tmp_path / "raw" / "images.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist() if name != "captions.csv"} == files
    before = (tmp_path / "raw" / "images.zip").read_bytes()
    download(tmp_path / "raw", asked)
    assert (tmp_path / "raw" / "images.zip").read_bytes() == before
    ingest(tmp_path / "raw", tmp_path / "images", tmp_path / "quarantine", ingest_params())
    index = json.loads((tmp_path / "images" / "index.json").read_text())
    assert (index["rows"], index["classes"], index["caption_count"]) == (3, ["cat", "dog"], 1)


@pytest.mark.parametrize("change", ["add", "remove", "edit"])
def test_a_pinned_prefix_that_changed_is_refused(bucket, server, tmp_path, change):
    put(bucket, "mine/1.png", picture(1))
    put(bucket, "mine/2.png", picture(2))
    pin = pin_of(server, "mine/")
    if change == "remove":
        bucket.delete_object(Bucket=BUCKET, Key="mine/2.png")
    else:
        put(bucket, {"add": "mine/3.png", "edit": "mine/2.png"}[change], picture(3))
    with pytest.raises(StageError, match=r"differ from download\.sha256; pin the present content"):
        download(tmp_path / "raw", params(server, "mine/", pin))


def test_keys_with_unsafe_paths_are_quarantined(bucket, server, tmp_path):
    for key in ("mine/../../up.png", "mine//etc/passwd.png", "mine/fine.png", "mine/sp ace+ü.png"):
        put(bucket, key, picture(len(key)))
    download(tmp_path / "raw", params(server, "mine/", pin_of(server, "mine/")))
    ingest(tmp_path / "raw", tmp_path / "images", tmp_path / "quarantine", ingest_params())
    index = json.loads((tmp_path / "images" / "index.json").read_text())
    assert (index["rows"], index["quarantined"]) == (2, {"unsafe path": 2})


def test_twenty_cut_connections(bucket, server, tmp_path, monkeypatch):
    """A large object in several ranges, cut at random places."""
    monkeypatch.setattr(objects, "RANGE_BYTES", 2 << 20)
    data = zip_of_noise(tmp_path, 9_000_000)
    put(bucket, "a.zip", data)
    with cutting(server, random_cuts(9_000_000)) as relay:
        download(tmp_path / "raw", params(f"http://127.0.0.1:{relay.port}", "a.zip", sha256_of(data)))
        assert not relay.cuts
    assert (tmp_path / "raw" / "images.zip").read_bytes() == data


def zip_of_noise(tmp_path, size):
    return write_zip(tmp_path / "noise.zip", {"a.png": noise(size)}).read_bytes()


def test_a_partial_download_is_continued_by_the_next_run(bucket, server, tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "ATTEMPTS", 1)
    monkeypatch.setattr(objects, "RANGE_BYTES", 1 << 20)
    data = zip_of_noise(tmp_path, 3_000_000)
    put(bucket, "a.zip", data)
    asked = params(server, "a.zip", sha256_of(data), s3={"endpoint_url": server, "connections": 1})
    append, calls = objects._append, []

    def dies(shared, stored, path, start, end):
        calls.append(start)
        if len(calls) == 3:
            raise KeyboardInterrupt
        append(shared, stored, path, start, end)

    monkeypatch.setattr(objects, "_append", dies)
    with pytest.raises(KeyboardInterrupt):
        download(tmp_path / "raw", asked)
    calls.clear()
    monkeypatch.setattr(objects, "_append", lambda *arguments: calls.append(arguments[3]) or append(*arguments))
    download(tmp_path / "raw", asked)
    assert calls == [2 << 20]
    assert (tmp_path / "raw" / "images.zip").read_bytes() == data


def test_an_object_that_changes_during_the_download_is_refused(bucket, server, tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "RANGE_BYTES", 1 << 20)
    data = zip_of_noise(tmp_path, 3_000_000)
    put(bucket, "a.zip", data)
    append = objects._append

    def changes(shared, stored, path, start, end):
        if start == 1 << 20:
            put(bucket, "a.zip", noise(len(data), 1))
        append(shared, stored, path, start, end)

    monkeypatch.setattr(objects, "_append", changes)
    with pytest.raises(StageError, match="was changed while it was downloaded"):
        download(
            tmp_path / "raw", params(server, "a.zip", sha256_of(data), s3={"endpoint_url": server, "connections": 1})
        )


@pytest.mark.parametrize("how", ["metadata", "etag", "parts"])
def test_damaged_bytes_are_detected(bucket, server, tmp_path, monkeypatch, how):
    monkeypatch.setattr(objects, "RANGE_BYTES", 4 << 20)
    data = noise(11 << 20)
    if how == "parts":
        upload = bucket.create_multipart_upload(Bucket=BUCKET, Key="m/a.png")["UploadId"]
        parts = []
        for number in (1, 2):
            body = data[(number - 1) * (6 << 20) : number * (6 << 20)]
            said = bucket.upload_part(Bucket=BUCKET, Key="m/a.png", UploadId=upload, PartNumber=number, Body=body)
            parts.append({"PartNumber": number, "ETag": said["ETag"]})
        bucket.complete_multipart_upload(
            Bucket=BUCKET, Key="m/a.png", UploadId=upload, MultipartUpload={"Parts": parts}
        )
        # moto does not say it; Amazon does, when asked for a part's head.
        monkeypatch.setattr(objects, "_part_size", lambda *_: 6 << 20)
    else:
        put(bucket, "m/a.png", data, Metadata={"sha256": sha256_of(data)} if how == "metadata" else {})
    asked = params(server, "m/", pin_of(server, "m/"))
    append = objects._append

    def damage(shared, stored, path, start, end):
        append(shared, stored, path, start, end)
        if start:
            content = bytearray(path.read_bytes())
            content[100] ^= 1
            path.write_bytes(content)

    monkeypatch.setattr(objects, "_append", damage)
    with pytest.raises(StageError, match="arrived damaged"):
        download(tmp_path / "raw", asked)
    monkeypatch.setattr(objects, "_append", append)
    download(tmp_path / "raw", asked)
    with zipfile.ZipFile(tmp_path / "raw" / "images.zip") as archive:
        assert archive.read("a.png") == data


def test_ranges_are_downloaded_in_parallel(bucket, server, tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "RANGE_BYTES", 1 << 20)
    data = zip_of_noise(tmp_path, 4_000_000)
    put(bucket, "a.zip", data)
    together = threading.Barrier(4, timeout=20)
    append = objects._append

    def waits(*arguments):
        together.wait()
        append(*arguments)

    monkeypatch.setattr(objects, "_append", waits)
    download(tmp_path / "raw", params(server, "a.zip", sha256_of(data)))
    assert (tmp_path / "raw" / "images.zip").read_bytes() == data


@pytest.mark.parametrize(
    ("key", "others", "said"),
    [
        ("missing.zip", {}, "does not exist"),
        ("nothing/", {}, "there is nothing below"),
        ("a.zip", {"sha256": "0" * 64}, "the sha256 of s3://pictures/a.zip is"),
        ("a.zip", {"max_bytes": 10}, "over download.max_bytes 10"),
        ("a.zip", {"allow_private_addresses": False}, "private address"),
        ("a.zip", {"s3": {"endpoint_url": "http://127.0.0.1:9"}}, "cannot be fetched"),
        ("a.zip", {"s3": {"endpoint_url": "no address"}}, "the configuration of S3 is invalid"),
    ],
)
def test_impossible_configurations_are_refused_in_one_sentence(bucket, server, tmp_path, key, others, said):
    data = write_zip(tmp_path / "a.zip", {"a.png": picture(1)}).read_bytes()
    put(bucket, "a.zip", data)
    with pytest.raises(StageError, match=said):
        download(tmp_path / "raw", params(server, key, **({"sha256": sha256_of(data)} | others)))


@pytest.mark.parametrize("credentials", ["none", "wrong"])
def test_missing_and_wrong_credentials_are_reported_and_never_printed(bucket, server, tmp_path, credentials):
    values = {"source": "folder", "url": f"s3://{BUCKET}/a.zip", "sha256": "0" * 64, "allow_private_addresses": True}
    file = write_params(tmp_path / "params.yaml", download=values | {"s3": {"endpoint_url": server}})
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    kept |= {"AWS_SHARED_CREDENTIALS_FILE": "/nowhere", "AWS_CONFIG_FILE": "/nowhere", "HOME": str(tmp_path)}
    if credentials == "wrong":
        kept |= {"AWS_ACCESS_KEY_ID": "AKWRONG", "AWS_SECRET_ACCESS_KEY": "very-secret"}
    command = [sys.executable, "-m", "tasks.download", str(tmp_path / "raw"), "--params", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (sentence,) = [line for line in done.stderr.splitlines() if "download: error:" in line]
    assert {"none": "there are no credentials for", "wrong": "does not exist"}[credentials] in sentence
    assert "very-secret" not in done.stderr + done.stdout and "Traceback" not in done.stderr
