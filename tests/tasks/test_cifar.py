"""The source `cifar10`, against small archives in the published format on a local server."""

import hashlib
import io
import os
import pickle
import tarfile

import numpy as np
import pytest

from tasks.ingest import ingest
from tasks.params import DownloadParams, ImageParams
from tasks.pictures import images
from tasks.pictures.index import read_index
from tasks.runtime import atomic
from tasks.runtime.errors import StageError
from tasks.sources import cifar
from tasks.sources.entry import write_manifest
from tests.support.data_inputs import ingest_params, serving

ROWS = 20


def batch(number):
    """One batch as published: channel-first rows of 3072 bytes, labels as a list, bytes as keys."""
    rng = np.random.default_rng(number)
    return {
        b"batch_label": b"testing",
        b"labels": rng.integers(0, 10, ROWS).tolist(),
        b"data": rng.integers(0, 256, (ROWS, 3072), np.uint8),
        b"filenames": [b"x.png"] * ROWS,
    }


class _Python2Pickler(pickle._Pickler):
    """Writes bytes as the strings of Python 2, in which the publisher pickled."""

    def save_bytes(self, value):
        head = b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + len(value).to_bytes(4, "little")
        self.write(head + value)
        self.memoize(value)


_Python2Pickler.dispatch = pickle._Pickler.dispatch | {bytes: _Python2Pickler.save_bytes}


def pickled(value):
    file = io.BytesIO()
    _Python2Pickler(file, 2).dump(value)
    # The module's name in the NumPy of that time.
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def archive(**changes):
    """The bytes of an archive; `data_batch_1=...` replaces the pickled content of one member, None leaves it out."""
    members = {f"data_batch_{number}": pickled(batch(number)) for number in range(1, 6)}
    members |= {"test_batch": pickled(batch(6)), "readme.html": b"<html>"}
    members["batches.meta"] = pickled({b"label_names": [name.encode() for name in cifar.CLASSES]})
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, data in (members | changes).items():
            if data is not None:
                info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture
def taken(tmp_path, monkeypatch):
    """Fetch `data` from a local server as if it were published there, and ingest it."""
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))

    def call(data, sha256=None):
        with serving() as site:
            site.files["/cifar.tar.gz"] = data
            published = cifar.Publication(
                (f"{site.address}/gone.tar.gz", f"{site.address}/cifar.tar.gz"),
                sha256 or hashlib.sha256(data).hexdigest(),
            )
            params = DownloadParams(source="cifar10", allow_private_addresses=True)
            with atomic.writing_folder(tmp_path / "raw") as raw:
                write_manifest(raw, "cifar10", cifar.copy(raw, params, published), "unknown")
        ingest(
            tmp_path / "raw", tmp_path / "images", tmp_path / "quarantine", ingest_params(caption_templates=["a {}"])
        )
        return read_index(tmp_path / "images")

    return call


def test_every_image_keeps_its_split_label_and_pixels(tmp_path, taken):
    index = taken(archive())
    assert index.splits == {"test": ROWS, "train": 5 * ROWS}
    assert index.classes == cifar.CLASSES
    train = images.load_pixels(tmp_path / "images", "train", ImageParams(resolution=32, channels=3))
    assert train.keys[:2] == ["data_batch_1/00000", "data_batch_1/00001"]
    expected = [batch(number) for number in range(1, 6)]
    assert np.array_equal(train.pixels.reshape(-1, 3072), np.concatenate([its[b"data"] for its in expected]))
    assert np.array_equal(train.labels, np.concatenate([its[b"labels"] for its in expected]))
    assert train.captions[0] == [f"a {cifar.CLASSES[train.labels[0]]}"]


def test_an_archive_with_a_wrong_checksum_is_not_unpickled(tmp_path, taken):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    with pytest.raises(StageError, match="checksum mismatch"):
        taken(archive(data_batch_1=pickle.dumps(Trap())), sha256="0" * 64)
    assert not (tmp_path / "sprung").exists()


def test_the_unpickler_builds_only_arrays_and_basic_types(tmp_path, taken):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    with pytest.raises(StageError, match=r"asks for (posix|nt)\.mkdir"):
        taken(archive(data_batch_1=pickle.dumps(Trap())))
    assert not (tmp_path / "sprung").exists()


def test_pickles_of_old_and_new_numpy_are_read():
    """The published pickles name `numpy.core`, which newer versions of NumPy call `numpy._core`."""
    old = pickled(batch(1))
    new = old.replace(b"numpy.core", b"numpy._core")
    assert new != old
    for form in (old, new):
        assert np.array_equal(cifar._unpickle(form)[b"data"], batch(1)[b"data"])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"test_batch": None}, "lacks cifar-10-batches-py/test_batch"),
        ({"data_batch_2": b"\x80\x02garbage"}, "damaged"),
        ({"batches.meta": pickled({b"label_names": [b"apple"]})}, "names the classes"),
    ],
)
def test_another_archive_is_refused(taken, changes, expected):
    with pytest.raises(StageError, match=expected):
        taken(archive(**changes))


def test_the_checksum_is_that_of_the_official_archive():
    assert cifar.OFFICIAL.sha256 == "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
    assert all(url.startswith("https://") for url in cifar.OFFICIAL.urls)
