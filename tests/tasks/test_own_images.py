"""Common layouts of users' datasets: sidecar files, webdataset shards, published samples."""

import io
import json
import tarfile

import pyarrow.parquet as pq
import pytest

from tasks.download import download
from tasks.ingest import ingest
from tasks.pictures.index import read_index
from tests.support.data_inputs import folder_params, ingest_params, picture, write_tree, write_zip


@pytest.fixture
def taken(tmp_path):
    """Index, rows by key, reasons of the quarantine by key."""

    def call(path, **others):
        raw, out, quarantine = tmp_path / "raw", tmp_path / "images", tmp_path / "quarantine"
        download(raw, folder_params(path))
        ingest(raw, out, quarantine, ingest_params(**others))
        index = read_index(out)
        rows = [row for shard in index.shards for row in pq.read_table(out / shard).to_pylist()]
        rows = [row | {"image": row["image"]["bytes"]} for row in rows]
        refused = pq.read_table(quarantine / "quarantine.parquet").to_pylist()
        assert index.inputs == len(rows) + len(refused)
        return index, {row["key"]: row for row in rows}, {row["key"]: row["reason"] for row in refused}

    return call


def tar_of(files, mode="w"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def shard(first, count=3):
    """A webdataset shard: key.jpg, key.txt, key.cls, key.json."""
    files = {}
    for number in range(first, first + count):
        key = f"{number:09d}"
        files[f"{key}.jpg"] = picture(number, kind="JPEG")
        files[f"{key}.txt"] = f"caption {number}".encode()
        files[f"{key}.cls"] = str(number % 2 + 9).encode()
        files[f"{key}.json"] = json.dumps({"caption": "not this one", "width": 12}).encode()
    return files


def check_shards(index, rows, prefix):
    assert (index.rows, index.quarantined, index.classes) == (6, {}, ["9", "10"])
    assert index.splits == {"test": 3, "train": 3}
    row = rows[f"{prefix}train-000000.tar/000000001.jpg"]
    assert (row["captions"], row["label"], row["image"]) == (["caption 1"], 1, picture(1, kind="JPEG"))


@pytest.mark.parametrize("form", ["folder", "zip", "tar", "tar.gz"])
def test_webdataset_shards(tmp_path, taken, form):
    files = {"train-000000.tar": tar_of(shard(0)), "test-000000.tar": tar_of(shard(3))}
    path = tmp_path / "in"
    if form == "folder":
        write_tree(path, files)
    elif form == "zip":
        write_zip(path, files)
    else:
        path.write_bytes(tar_of(files, "w:gz" if form == "tar.gz" else "w"))
    index, rows, _ = taken(path)
    check_shards(index, rows, "")


def test_one_shard_is_an_archive_like_any_other(tmp_path, taken):
    (tmp_path / "a.tar").write_bytes(tar_of(shard(0)))
    index, rows, _ = taken(tmp_path / "a.tar")
    assert (index.rows, index.quarantined, index.classes) == (3, {}, ["9", "10"])
    assert rows["000000002.jpg"]["captions"] == ["caption 2"]


def test_folders_inside_a_shard_are_classes_and_the_shard_is_none(tmp_path, taken):
    files = {
        "0.tar": tar_of({"cat/1.png": picture(1), "dog/2.png": picture(2)}),
        "1.tar": tar_of({"3.png": picture(3)}),
    }
    index, rows, _ = taken(write_tree(tmp_path / "in", files))
    assert index.classes == ["cat", "dog"]
    assert rows["1.tar/3.png"]["label"] is None


def test_a_damaged_shard_quarantines_only_that_shard(tmp_path, taken):
    whole = tar_of(shard(0))
    inner = tar_of({"deep.tar": tar_of(shard(9)), "../up.png": picture(1)})
    files = {"a.tar": whole, "cut.tar": tar_of(shard(3))[:1500], "text.tar": b"no tar at all", "nested.tar": inner}
    _, rows, refused = taken(write_tree(tmp_path / "in", files))
    assert {key.partition("/")[0] for key in rows} == {"a.tar"}
    assert refused == {
        "cut.tar": "damaged in the archive",
        "text.tar": "damaged in the archive",
        "nested.tar/../up.png": "unsafe path",
        "nested.tar/deep.tar": "no image file",
    }


def test_files_beside_images(tmp_path, taken):
    files = {
        "cat/1.png": picture(1),
        "cat/1.txt": "\ufefffirst\r\n\r\n  second, Zürich \n".encode(),
        "cat/2.png": picture(2),
        "cat/2.caption": b"only",
        "dog/3.png": picture(3),
        "dog/3.json": json.dumps({"Caption": ["one", "two"], "text": "three", "other": 5}).encode(),
        "dog/4.png": picture(4),
        "dog/4.txt": b"",
        "dog/4.json": b"{broken",
        "dog/5.png": picture(5),
        "dog/5.txt": b"caf\xe9",
        "README.txt": b"about these pictures",
        "captions.csv": b"image,caption\ncat/1.png,from the table\n",
    }
    index, rows, refused = taken(write_tree(tmp_path / "in", files))
    assert {key: row["captions"] for key, row in rows.items()} == {
        "cat/1.png": ["from the table", "first", "second, Zürich"],
        "cat/2.png": ["only"],
        "dog/3.png": ["one", "two", "three"],
        "dog/4.png": [],
    }
    assert refused == {
        "README.txt": "no image file",
        "dog/4.json": "captions not read",
        "dog/5.png": "caption not UTF-8",
    }
    assert index.classes == ["cat", "dog"]


def test_a_table_with_five_captions_per_image_is_read(tmp_path, taken):
    """The layout of the Flickr8k sample: one folder of pictures, five lines each, no classes."""
    lines = [f"{number}.jpg,caption {turn} of {number} ." for number in range(4) for turn in range(5)]
    files = {f"images/{number}.jpg": picture(number, kind="JPEG") for number in range(4)}
    table = "\n".join(["image,caption", *lines]) + "\n"
    index, rows, refused = taken(write_zip(tmp_path / "f.zip", files | {"captions.csv": table.encode()}))
    assert (index.classes, index.caption_count, refused) == ([], 20, {})
    assert rows["images/3.jpg"]["captions"] == [f"caption {turn} of 3 ." for turn in range(5)]


def test_folders_above_the_class_folders_are_ignored(tmp_path, taken):
    """The layout of the CelebA-HQ sample: ref and src are no classes, and no splits."""
    names = ["ref/female/1.jpg", "ref/male/2.jpg", "src/female/3.jpg", "src/male/4.jpg"]
    files = {name: picture(number, kind="JPEG") for number, name in enumerate(names)}
    index, rows, _ = taken(write_zip(tmp_path / "c.zip", files), caption_templates=["a photo of the face of a {}"])
    assert index.classes == ["female", "male"]
    assert rows["src/male/4.jpg"]["captions"] == ["a photo of the face of a male"]
