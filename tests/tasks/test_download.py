"""The stage `download`: the files of data/raw, and the errors of sources that cannot be read."""

import hashlib
import json
import os
import subprocess
import sys
import tarfile

import pytest

from tasks.download import download
from tasks.runtime.errors import StageError
from tests.support.data_inputs import (
    ROOT,
    call_stage,
    contents,
    folder_params,
    picture,
    serving,
    write_params,
    write_tree,
    write_zip,
)

FILES = {"cat/a.png": picture(1), "cat/b.png": picture(2), "dog/c.png": picture(3)}


@pytest.fixture
def folder(tmp_path):
    return write_tree(tmp_path / "pictures", FILES)


def manifest(raw):
    """The manifest, with what it says about its one file."""
    said = json.loads((raw / "manifest.json").read_text())
    (file,) = said["files"]
    return said | file


def test_the_manifest_describes_the_one_file(folder, tmp_path):
    raw = tmp_path / "raw"
    download(raw, folder_params(folder, licence="mine"))
    said = manifest(raw)
    assert sorted(path.name for path in raw.iterdir()) == ["images.zip", "manifest.json"]
    assert said["sha256"] == hashlib.sha256((raw / "images.zip").read_bytes()).hexdigest()
    assert (said["licence"], said["source"], said["origin"]) == ("mine", "folder", "pictures")
    assert str(tmp_path) not in (raw / "manifest.json").read_text()


def test_the_same_folder_gives_the_same_bytes(folder, tmp_path):
    download(tmp_path / "one", folder_params(folder))
    copy = write_tree(tmp_path / "elsewhere" / "pictures", dict(reversed(FILES.items())))
    for path in copy.rglob("*.png"):
        os.utime(path, (0, 0))
        path.chmod(0o600)
    download(tmp_path / "two", folder_params(copy))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("change", ["edit", "add", "remove", "rename"])
def test_a_changed_folder_changes_the_manifest(folder, tmp_path, change):
    raw = tmp_path / "raw"
    download(raw, folder_params(folder))
    before = manifest(raw)["sha256"]
    file = folder / "cat" / "a.png"
    if change == "edit":
        file.write_bytes(picture(9))
    elif change == "add":
        (folder / "cat" / "z.png").write_bytes(picture(9))
    elif change == "remove":
        file.unlink()
    else:
        file.rename(folder / "dog" / "a.png")
    download(raw, folder_params(folder))
    assert manifest(raw)["sha256"] != before


def test_an_archive_is_copied_and_never_linked(tmp_path):
    archive = write_zip(tmp_path / "mine.zip", FILES)
    download(tmp_path / "raw", folder_params(archive))
    copy = tmp_path / "raw" / "images.zip"
    assert copy.read_bytes() == archive.read_bytes()
    assert copy.stat().st_ino != archive.stat().st_ino
    assert archive.stat().st_nlink == 1


def test_a_tar_is_recognised_by_its_content(tmp_path):
    path = tmp_path / "data.bin"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(write_tree(tmp_path / "pictures", FILES), "pictures")
    download(tmp_path / "raw", folder_params(path))
    assert manifest(tmp_path / "raw")["name"] == "images.tar"


def test_an_archive_is_downloaded_from_a_url(tmp_path, monkeypatch):
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    data = write_zip(tmp_path / "mine.zip", FILES).read_bytes()
    with serving() as site:
        site.files["/mine.zip"] = data
        params = folder_params(
            url=f"{site.address}/mine.zip",
            sha256=hashlib.sha256(data).hexdigest(),
            allow_private_addresses=True,
        )
        download(tmp_path / "raw", params)
    assert (tmp_path / "raw" / "images.zip").read_bytes() == data
    assert manifest(tmp_path / "raw")["origin"] == f"{site.address}/mine.zip"


def test_a_signed_url_from_the_environment_is_not_recorded(tmp_path):
    """Through the real command: the address is in no output, and nothing of it is in any file that is left."""
    data = write_zip(tmp_path / "mine.zip", FILES).read_bytes()
    with serving() as site:
        site.files["/mine.zip?X-Amz-Signature=SECRET"] = data
        url = site.address.replace("http://", "http://me:PASSWORD@") + "/mine.zip?X-Amz-Signature=SECRET"
        values = {"source": "folder", "url": "env:MY_SIGNED_URL", "sha256": hashlib.sha256(data).hexdigest()}
        params = write_params(tmp_path / "params.yaml", download=values | {"allow_private_addresses": True})
        command = [sys.executable, "-m", "tasks.download", str(tmp_path / "raw"), "--params", str(params)]
        scratch = {"AFTERIMAGE_SCRATCH": str(tmp_path / "scratch")}
        for variables, code in (({"MY_SIGNED_URL": url}, 0), ({"MY_SIGNED_URL": url + "x"}, 1), ({}, 1)):
            done = subprocess.run(
                command, cwd=ROOT, env=os.environ | scratch | variables, capture_output=True, text=True
            )
            assert done.returncode == code, done.stderr
            assert "SECRET" not in done.stdout + done.stderr and "PASSWORD" not in done.stdout + done.stderr
            assert code == 0 or len(done.stderr.strip().splitlines()) == 1
    assert site.tokens[0][1].startswith("Basic ")
    assert manifest(tmp_path / "raw")["origin"] == f"{site.address}/mine.zip"
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in left if b"SECRET" in path.read_bytes() or b"PASSWORD" in path.read_bytes()]


def test_the_digits_come_with_scikit_learn(tmp_path):
    params = write_params(tmp_path / "params.yaml")
    done = call_stage("download", tmp_path / "raw", params=params)
    assert done.returncode == 0, done.stderr
    assert manifest(tmp_path / "raw")["size"] == 57523


def test_a_failed_download_keeps_the_earlier_one(folder, tmp_path):
    raw = tmp_path / "raw"
    download(raw, folder_params(folder))
    before = contents(raw)
    with pytest.raises(StageError):
        download(raw, folder_params(tmp_path / "missing"))
    assert contents(raw) == before


def _missing(tmp_path):
    return {"source": "folder", "path": str(tmp_path / "missing")}, "does not exist"


def _empty(tmp_path):
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    return {"source": "folder", "path": str(tmp_path / "empty")}, "is empty"


def _no_archive(tmp_path):
    (tmp_path / "one.png").write_bytes(picture(1))
    return {"source": "folder", "path": str(tmp_path / "one.png")}, "neither a zip nor a tar"


def _cut_archive(tmp_path):
    whole = write_zip(tmp_path / "whole.zip", FILES).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    return {"source": "folder", "path": str(tmp_path / "cut.zip")}, "is truncated"


def _unreachable(_):
    address = {"source": "folder", "url": "http://127.0.0.1:9/x.zip", "sha256": "0" * 64}
    return address | {"allow_private_addresses": True}, "could not fetch http://127.0.0.1:9/x.zip"


def _unknown_host(_):
    return {"source": "folder", "url": "http://no-such-host.invalid/x.zip", "sha256": "0" * 64}, "cannot be found"


def _private(_):
    return {"source": "folder", "url": "http://169.254.169.254/latest", "sha256": "0" * 64}, "private address"


@pytest.mark.parametrize("case", [_missing, _empty, _no_archive, _cut_archive, _unreachable, _unknown_host, _private])
def test_bad_sources_end_with_one_sentence(tmp_path, monkeypatch, case):
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    values, expected = case(tmp_path)
    params = write_params(tmp_path / "params.yaml", download=values)
    done = call_stage("download", tmp_path / "raw", params=params)
    assert done.returncode == 1
    assert expected in done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if "download: error:" in line]
    assert "Traceback" not in done.stderr
    assert len(sentence) < 500
    assert not (tmp_path / "raw").exists()


def test_a_checksum_mismatch_ends_with_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    with serving() as site:
        site.files["/x.zip"] = b"not what was promised"
        values = {"source": "folder", "url": f"{site.address}/x.zip", "sha256": "0" * 64}
        params = write_params(tmp_path / "params.yaml", download=values | {"allow_private_addresses": True})
        done = call_stage("download", tmp_path / "raw", params=params)
    assert done.returncode == 1
    assert "checksum mismatch" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_reported_before_the_copy(folder, tmp_path, monkeypatch):
    archive = write_zip(tmp_path / "mine.zip", FILES)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    for path in (archive, folder):
        with pytest.raises(StageError, match="are free"):
            download(tmp_path / "raw", folder_params(path))
