"""The source `hub`, against a local server with the hub's API, with data sets in their published formats."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants as hub_constants
import numpy as np
import pyarrow.parquet as pq
import pytest

from tasks.download import download
from tasks.ingest import ingest
from tasks.params import DownloadParams
from tasks.pictures.index import read_index
from tasks.runtime.errors import StageError
from tasks.web import fetch
from tests.support.data_inputs import ROOT, cutting, ingest_params, picture, random_cuts, serving, write_params
from tests.support.hub_site import COMMIT, publish, table

CLASSES = ["airplane", "automobile", "bird"]
CIFAR = {"img": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}


@pytest.fixture
def site(monkeypatch, tmp_path):
    with serving() as site:
        monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
        monkeypatch.setattr(hub_constants, "ENDPOINT", site.address)
        monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub_constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(fetch, "PAUSE_SECONDS", 0.01)
        yield site


def params(repo, columns=None, **others):
    values = {"source": "hub", "hub": {"repo": repo, "revision": COMMIT}, "allow_private_addresses": True}
    return DownloadParams.model_validate(values | {"columns": columns or {}} | others)


@pytest.fixture
def taken(tmp_path):
    """Download and ingest; returns the index, the rows by key and the quarantine by key."""

    def call(asked, **others):
        raw, out, quarantine = tmp_path / "raw", tmp_path / "images", tmp_path / "quarantine"
        download(raw, asked)
        ingest(raw, out, quarantine, ingest_params(**others))
        index = read_index(out)
        rows = [row for shard in index.shards for row in pq.read_table(out / shard).to_pylist()]
        rows = [row | {"image": row["image"]["bytes"]} for row in rows]
        refused = pq.read_table(quarantine / "quarantine.parquet").to_pylist()
        assert index.inputs == len(rows) + len(refused)
        return index, {row["key"]: row for row in rows}, {row["key"]: row for row in refused}

    return call


def test_cifar10_as_published(site, taken):
    train = [picture(seed, (32, 32)) for seed in range(6)]
    test = [picture(seed, (32, 32)) for seed in range(6, 9)]
    files = {
        "plain_text/train-00000-of-00001.parquet": table(train, CIFAR, "img", label=[0, 1, 2, 0, 1, 2]),
        "plain_text/test-00000-of-00001.parquet": table(test, CIFAR, "img", label=[2, 1, 0]),
    }
    publish(site, "uoft-cs/cifar10", files)
    index, rows, _ = taken(params("uoft-cs/cifar10", images=9), caption_templates=["a {}"])
    assert index.classes == CLASSES
    assert index.splits == {"test": 3, "train": 6}
    first = rows["plain_text/test-00000-of-00001/0000000"]
    assert (first["image"], first["label"], first["captions"]) == (test[0], 2, ["a bird"])


def test_celebahq_as_published(site, taken):
    """Six files with hashes in their names, a held-out validation file, labels without class names."""
    files = {
        f"data/train-0000{number}-of-00002-0a1b2c3d4e5f.parquet": table([picture(number)] * 2, label=[0, 1])
        for number in range(2)
    } | {"data/validation-00000-of-00001-9f8e7d.parquet": table([picture(7)], label=[1])}
    publish(site, "mattymchen/celeba-hq", files)
    asked = params("mattymchen/celeba-hq", {"classes": ["woman", "man"]}, images=5)
    index, rows, _ = taken(asked, caption_templates=["a photo of the face of a {}"])
    assert index.splits == {"test": 1, "train": 4}
    held_out = rows["data/validation-00000-of-00001-9f8e7d/0000000"]
    assert held_out["captions"] == ["a photo of the face of a man"]
    with pytest.raises(StageError, match="holds 5 images, not 30000"):
        taken(params("mattymchen/celeba-hq", images=30_000))


def test_pictures_with_captions(site, taken):
    lists = [["one", " two "], ["three"], [], None]
    data = table([picture(seed) for seed in range(4)], image="photo", sentences=lists, note=["a", "b", None, ""])
    publish(site, "some/pairs", {"train.parquet": data})
    columns = {"image": "photo", "captions": ["sentences", "note"]}
    _, rows, _ = taken(params("some/pairs", columns))
    assert [row["captions"] for _, row in sorted(rows.items())] == [["one", "two", "a"], ["three", "b"], [], []]
    plain = table([picture(1)], image="jpg", caption=["a thing"])
    publish(site, "other/pairs", {"0000.parquet": plain})
    _, rows, _ = taken(params("other/pairs"))
    assert rows["0000/0000000"]["captions"] == ["a thing"]


def test_rows_that_cannot_be_loaded_are_quarantined(site, taken):
    pictures = [picture(0), None, b"<html>", picture(3), picture(4), picture(5), b"x" * 5000]
    labels = [0, 1, 2, 7, -1, None, 1]
    publish(site, "a/b", {"train.parquet": table(pictures, CIFAR | {"image": {"_type": "Image"}}, label=labels)})
    _, rows, refused = taken(params("a/b"), max_image_bytes=4000)
    assert {key: row["label"] for key, row in rows.items()} == {
        "train/0000000": 0,
        "train/0000004": None,
        "train/0000005": None,
    }
    assert {key: row["reason"] for key, row in refused.items()} == {
        "train/0000001": "no bytes",
        "train/0000002": "not an image",
        "train/0000003": "label out of range",
        "train/0000006": "oversized",
    }


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (["dog", "cat", "dog"], ["cat", "dog"], [1, 0, 1]),
        ([3, 0, 1], ["0", "1", "2", "3"], [3, 0, 1]),
    ],
)
def test_undeclared_classes_are_taken_from_the_labels(site, taken, labels, classes, expected):
    publish(site, "a/b", {"data.parquet": table([picture(seed) for seed in range(3)], label=labels)})
    index, rows, _ = taken(params("a/b"))
    assert index.classes == classes
    assert [row["label"] for _, row in sorted(rows.items())] == expected


def test_nan_labels_and_captions_are_missing_values(site, taken):
    """Columns with NaN, as written by pandas: no label, no caption; a number that is not a class goes to quarantine."""
    labels = [0.0, 1.0, float("nan"), 1.5, float("inf"), None]
    captions = [float("nan")] * 6
    data = table([picture(seed) for seed in range(6)], label=labels, note=captions)
    publish(site, "a/b", {"data.parquet": data})
    index, rows, refused = taken(params("a/b", {"label": "label", "captions": ["note"]}))
    assert index.classes == ["0", "1"]
    assert [row["label"] for _, row in sorted(rows.items())] == [0, 1, None, None]
    assert not any(row["captions"] for row in rows.values())
    assert {key[-1]: row["reason"] for key, row in refused.items()} == dict.fromkeys("34", "label out of range")


def test_a_label_may_be_an_element_of_a_list(site, taken):
    """As the 40 attributes of CelebA are published beside its pictures of 256x256."""
    male = [0, 1, 1]
    attributes = [[1] * 20 + [its] + [0] * 19 for its in male] + [[1]]
    data = table([picture(seed) for seed in range(4)], attributes=attributes)
    publish(site, "eurecom-ds/celeba-hq-256", {"data/train-00000-of-00001.parquet": data})
    columns = {"image": "image", "label": "attributes[20]", "classes": ["woman", "man"]}
    asked = params("eurecom-ds/celeba-hq-256", columns, images=4)
    index, rows, _ = taken(asked, caption_templates=["a photo of the face of a {}"])
    assert index.classes == ["woman", "man"]
    found = [(row["label"], row["captions"]) for _, row in sorted(rows.items())]
    assert found[0] == (0, ["a photo of the face of a woman"])
    assert [label for label, _ in found] == [*male, None]
    assert taken(params("eurecom-ds/celeba-hq-256", {"label": "attributes[20]"}))[0].classes == ["0", "1"]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"label": "attributes"}, "download.columns.label: the column 'attributes' holds list"),
        ({"label": "number[0]"}, "download.columns.label: the column 'number' holds int64"),
        ({"label": "number"}, "numbers up to 123456789, too large for labels"),
        ({"classes": ["woman", "man"]}, "no column holds labels for download.columns.classes"),
    ],
)
def test_a_column_that_holds_no_labels_is_named(site, taken, columns, said):
    publish(site, "a/b", {"data.parquet": table([picture(1)], attributes=[[1, 0]], number=[123_456_789])})
    with pytest.raises(StageError, match=re.escape(said)):
        taken(params("a/b", columns))


def test_a_branch_as_revision_is_refused_with_the_commit_to_pin(site, taken):
    publish(site, "a/b", {"train.parquet": table([picture(1)])})
    for revision in (None, "main"):
        with pytest.raises(StageError, match=f"download.hub.revision={COMMIT}"):
            taken(params("a/b", hub={"repo": "a/b", "revision": revision}))


def test_twenty_cut_connections(site, taken, tmp_path, monkeypatch):
    noise = [np.random.default_rng(seed).bytes(20_000) for seed in range(20)]
    data = table([picture(1), *noise])
    publish(site, "a/b", {"train.parquet": data})
    with cutting(site.address, random_cuts(len(data))) as relay:
        monkeypatch.setattr(hub_constants, "ENDPOINT", f"http://127.0.0.1:{relay.port}")
        download(tmp_path / "raw", params("a/b"))
        assert not relay.cuts
    assert (tmp_path / "raw" / "train.parquet").read_bytes() == data


def test_only_the_listing_and_the_files_are_requested(site, taken):
    """No telemetry, no search for who is asking."""
    publish(site, "a/b", {"train.parquet": table([picture(1)]), "extra.parquet": table([picture(2)])})
    taken(params("a/b", hub={"repo": "a/b", "revision": COMMIT, "files": "train*"}))
    paths = [path.split("?")[0].split("/")[1] for path, _ in site.requests]
    assert paths == ["api", "datasets", "storage"]


def test_the_token_is_sent_only_to_the_hub(site, taken, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "right")
    publish(site, "a/b", {"train.parquet": table([picture(1)])})
    resolve = f"/datasets/a/b/resolve/{COMMIT}/train.parquet"
    site.refusals[resolve] = (401, {"X-Error-Code": "GatedRepo"})
    with serving() as storage:
        (path,) = (path for path in site.files if path.startswith("/storage"))
        storage.files[path] = site.files.pop(path)
        site.redirects[resolve] = storage.address + path
        taken(params("a/b"))
        assert storage.tokens == [(path, None)]
    assert (resolve, "Bearer right") in site.tokens
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"Bearer" not in written and b"secret" not in written


def entry_point(site, tmp_path, **environment):
    values = {"source": "hub", "hub": {"repo": "a/b", "revision": COMMIT, "files": "*.parquet"}}
    file = write_params(tmp_path / "params.yaml", download=values | {"allow_private_addresses": True})
    command = [sys.executable, "-m", "tasks.download", str(tmp_path / "raw"), "--params", str(file)]
    variables = {"HF_ENDPOINT": site.address, "HF_HOME": str(tmp_path / "home"), **environment}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return subprocess.run(command, cwd=ROOT, env=kept | variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("where", "status", "code", "token", "said"),
    [
        ("listing", 401, "GatedRepo", None, "is gated; accept its terms on that page, then set HF_TOKEN"),
        ("file", 403, "GatedRepo", None, "is gated; accept its terms on that page, then set HF_TOKEN"),
        ("file", 403, "GatedRepo", "hf_wrong_secret", "the token of HF_TOKEN has no access"),
        ("file", 401, "", "hf_wrong_secret", "rejects the token of HF_TOKEN"),
        ("listing", 401, "RepoNotFound", "hf_wrong_secret", "does not exist or is private"),
        ("listing", 404, "RevisionNotFound", None, f"has no revision '{COMMIT}'"),
        ("listing", 500, "", None, "answered 500"),
    ],
)
def test_refusals_of_the_hub_are_explained_in_one_sentence(site, taken, monkeypatch, where, status, code, token, said):
    publish(site, "a/b", {"train.parquet": table([picture(1)])})
    path = f"/datasets/a/b/resolve/{COMMIT}/train.parquet"
    if where == "listing":
        path = f"/api/datasets/a/b/revision/{COMMIT}?blobs=true"
    site.refusals[path] = (status, {"X-Error-Code": code} if code else {})
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(StageError) as refused:
        taken(params("a/b"))
    assert said in str(refused.value)
    assert "secret" not in str(refused.value)


def test_the_token_is_never_printed(site, tmp_path):
    publish(site, "a/b", {"train.parquet": table([picture(1)])})
    site.refusals[f"/datasets/a/b/resolve/{COMMIT}/train.parquet"] = (403, {"X-Error-Code": "GatedRepo"})
    done = entry_point(site, tmp_path, HF_TOKEN="hf_wrong_secret", HF_DEBUG="1")
    assert done.returncode == 1
    (sentence,) = [line for line in done.stderr.splitlines() if "download: error:" in line]
    assert "the token of HF_TOKEN has no access" in sentence
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr + done.stdout


def fill_cache(home: Path, name: str, data: bytes) -> Path:
    """The hub's cache as huggingface_hub lays it out: a snapshot of links to blobs named by their sha256."""
    repo = home / "hub" / "datasets--a--b"
    blob = repo / "blobs" / hashlib.sha256(data).hexdigest()
    link = repo / "snapshots" / COMMIT / name
    for path in (blob, link):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    link.symlink_to(os.path.relpath(blob, link.parent))
    return blob


def test_offline_mode_uses_only_the_cache(site, tmp_path):
    files = {f"train-0000{number}-of-00002.parquet": table([picture(number)]) for number in range(2)}
    publish(site, "a/b", files)
    (first, data), (second, other) = files.items()
    blob = fill_cache(tmp_path / "home", first, data)
    done = entry_point(site, tmp_path, HF_HUB_OFFLINE="1")
    assert "the local cache lacks train-00001-of-00002" in done.stderr
    fill_cache(tmp_path / "home", second, other)
    done = entry_point(site, tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "raw" / first).read_bytes() == data
    assert json.loads((tmp_path / "raw" / "manifest.json").read_text())["origin"] == f"hf://datasets/a/b@{COMMIT}"
    assert site.requests == []
    blob.write_bytes(data[:-1] + b"x")
    done = entry_point(site, tmp_path, HF_HUB_OFFLINE="1")
    assert "cache is damaged" in done.stderr


def test_cached_files_are_not_downloaded_again(site, tmp_path):
    data = table([picture(1)])
    publish(site, "a/b", {"train.parquet": data})
    fill_cache(tmp_path / "home", "train.parquet", data)
    done = entry_point(site, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path for path, _ in site.requests] == [f"/api/datasets/a/b/revision/{COMMIT}?blobs=true"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hub": {"repo": "a/b", "revision": COMMIT, "files": "*.zip"}}, "no file of a/b matches"),
        ({"hub": {"repo": "a/b", "revision": COMMIT, "files": "README.md"}}, "publishes no sha256"),
        ({"hub": {"repo": "a/b/c", "revision": COMMIT}}, "is not the name of a dataset"),
        ({"max_bytes": 10}, "over download.max_bytes 10"),
        ({"columns": {"image": "pixels"}}, "no column 'pixels'"),
        ({"columns": {"captions": ["words"]}}, "no column 'words'"),
        ({"allow_private_addresses": False}, "private address 127.0.0.1"),
    ],
)
def test_impossible_configurations_are_refused_in_one_sentence(site, taken, values, said):
    publish(site, "a/b", {"train.parquet": table([picture(1)])})
    with pytest.raises(StageError, match=said):
        taken(params("a/b", **values))


def test_a_table_without_images_and_a_file_that_is_not_parquet_are_refused(site, taken):
    publish(site, "a/b", {"train.parquet": b"PAR1 not really", "x.txt": b"text"})
    with pytest.raises(StageError, match="is not a Parquet file"):
        taken(params("a/b"))
    publish(site, "c/d", {"train.parquet": table([picture(1)], image="thing")})
    with pytest.raises(StageError, match="no column holds images"):
        taken(params("c/d"))
