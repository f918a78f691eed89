"""The source `cifar10`: the archive published by its authors, 60,000 colour images of 32x32 in ten classes.

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009).

The archive holds Python pickles. They are read only after the checksum is verified, and only by an unpickler that
builds nothing but arrays and basic types.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from numpy._core.multiarray import _reconstruct

from tasks.runtime import workspace
from tasks.runtime.errors import StageError
from tasks.sources.entry import Entry, Source
from tasks.web import fetch

if TYPE_CHECKING:
    from tasks.params import DownloadParams


@dataclass(frozen=True)
class Publication:
    """Addresses and checksum of an archive."""

    urls: tuple[str, ...]
    sha256: str


OFFICIAL = Publication(
    (
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/cifar-10-python.tar.gz",
    ),
    "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
)
FILE = "cifar-10-python.tar.gz"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FOLDER = "cifar-10-batches-py"
BATCHES = {f"{FOLDER}/data_batch_{number}": "train" for number in range(1, 6)} | {f"{FOLDER}/test_batch": "test"}
NAMES = f"{FOLDER}/batches.meta"
MAX_MEMBER_BYTES = 64 << 20


def copy(raw: Path, params: DownloadParams, publication: Publication = OFFICIAL) -> str:
    """Fetch the published archive into `raw` and return its address. `params.url` is tried first, if it is set."""
    mirrors = [fetch.address(params.url, "download.url")] if params.url else []
    urls = mirrors + list(publication.urls)
    return fetch.fetch(
        urls,
        raw / FILE,
        sha256=publication.sha256,
        partial=workspace.scratch() / "downloads",
        max_bytes=params.max_bytes,
        timeout_seconds=params.timeout_seconds,
        allow_private_addresses=params.allow_private_addresses,
    )


def read(file: Path) -> Source:
    """The archive -> one PNG per image, with its published split and label."""
    return Source(CLASSES, None, _entries(file))


def _entries(file: Path) -> Iterator[Entry]:
    missing = {*BATCHES, NAMES}
    try:
        with tarfile.open(file, "r|gz") as archive:
            for member in archive:
                if member.name not in missing or not member.isreg() or member.size > MAX_MEMBER_BYTES:
                    continue
                missing.discard(member.name)
                content = archive.extractfile(member)
                batch = _unpickle(content.read() if content else b"")
                if member.name == NAMES:
                    _require_classes(batch)
                else:
                    yield from _pictures(member.name.rpartition("/")[2], BATCHES[member.name], batch)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise StageError(f"{file.name} is damaged ({error}); run 'dvc repro -f download'") from None
    if missing:
        raise StageError(f"{file.name} lacks {', '.join(sorted(missing))}; it is not the published archive")


def _pictures(batch_name: str, split: str, batch: dict[bytes, Any]) -> Iterator[Entry]:  # of `_unpickle`
    """One batch, `data` uint8 [n, 3072] channel first and `labels` [n] -> entries."""
    planes = batch[b"data"].reshape(-1, 3, 32, 32)
    for row, (pixels, label) in enumerate(zip(planes, batch[b"labels"], strict=True)):
        png = io.BytesIO()
        PIL.Image.fromarray(pixels.transpose(1, 2, 0).copy()).save(png, "PNG")
        data = png.getvalue()
        yield Entry(f"{batch_name}/{row:05d}", data, len(data), label=int(label), split=split)


def _require_classes(names: dict[bytes, Any]) -> None:  # of `_unpickle`
    published = [name.decode() for name in names[b"label_names"]]
    if published != CLASSES:
        raise StageError(f"the archive names the classes {published}, not {CLASSES}; it is not the published archive")


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of dicts, lists, bytes, numbers and NumPy arrays."""

    def find_class(self, module: str, name: str) -> Any:  # as in pickle.Unpickler
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in allowed:
            raise StageError(f"the archive asks for {module}.{name}, which CIFAR-10 does not need; do not use it")
        return allowed[module, name]


def _unpickle(data: bytes) -> dict[bytes, Any]:  # the keys determine the types of the values
    try:
        batch: dict[bytes, Any] = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError) as error:
        raise StageError(f"a batch of the archive is damaged ({error}); run 'dvc repro -f download'") from None
    return batch
