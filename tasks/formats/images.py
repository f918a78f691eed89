"""The normal form of images: Parquet shards of encoded pictures with their metadata, and an index.

    data/images/shard-<hex>.parquet    rows whose key's sha256 begins with <hex>
    data/images/index.json             counts, class names, licence, content hash

This file owns the form: who writes it, and who turns it into pixels, goes through here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tasks.formats import decoding
from tasks.runtime import workspace
from tasks.runtime.stage import StageError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tasks.params import ImageParams

FORMAT = 1
ROW_GROUP_ROWS = 1024
WRITE_BUFFER_BYTES = 128 << 20
IN_MEMORY_BYTES = 1 << 30
"""Pixels of a split that take more are kept in a file, see `Samples`."""


@dataclass(frozen=True)
class Samples:
    """One split as pixels, sorted by key.

    Pixels that take more than `IN_MEMORY_BYTES` lie in a nameless file in the scratch folder, which is mapped into
    memory and goes with the array: the system keeps as much of it at hand as there is room for. So who takes many
    rows of them takes them in parts.
    """

    pixels: np.ndarray
    """uint8 [N, channels, size, size]"""
    labels: np.ndarray
    """int64 [N]; -1 where there is none"""
    captions: list[list[str]]
    keys: list[str]


def schema() -> pa.Schema:
    """Columns of a shard."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("image", pa.binary(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("mode", pa.string(), nullable=False),
            pa.field("label", pa.int64()),
            pa.field("captions", pa.list_(pa.string()), nullable=False),
            pa.field("split", pa.string(), nullable=False),
            pa.field("sha256", pa.string(), nullable=False),
            pa.field("phash", pa.string(), nullable=False),
            pa.field("safety", pa.string()),
            pa.field("licence", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
        ]
    )


@functools.lru_cache(maxsize=1)
def key_hash(key: str) -> str:
    """sha256 of a key; its first digits choose the shard, its last ones the split, one after the other."""
    return hashlib.sha256(key.encode("utf-8")).hexdigest()


def split_of(key: str, held_out_fraction: float) -> str:
    """The split of a key where the source publishes none: "test" for `held_out_fraction` of all keys."""
    return "test" if int(key_hash(key)[-8:], 16) < held_out_fraction * 2**32 else "train"


@dataclass
class Writer:
    """Writes rows into `shards` Parquet files in `folder` (a temporary one: see `tasks.runtime.atomic`).

    Rows of a shard stand in the order in which they were added. Memory is bounded: a shard's
    rows are flushed as one row group when there are 1024 of them, or when they are big.
    """

    folder: Path
    shards: int
    rows: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    captions: int = 0
    _pending: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    _bytes: dict[str, int] = field(default_factory=dict)
    _files: dict[str, pq.ParquetWriter] = field(default_factory=dict)
    _content: dict[str, bytes] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        """Take one row with every column of `schema`."""
        shard = key_hash(row["key"])[: {1: 0, 16: 1, 256: 2}[self.shards]] or "0"
        self._pending.setdefault(shard, []).append(row)
        self._bytes[shard] = self._bytes.get(shard, 0) + len(row["image"])
        self.rows += 1
        self.splits[row["split"]] = self.splits.get(row["split"], 0) + 1
        self.captions += len(row["captions"])
        identity = [row[name] for name in ("key", "sha256", "split", "label", "captions")]
        self._content[row["key"]] = hashlib.sha256(json.dumps(identity).encode("utf-8")).digest()
        if len(self._pending[shard]) >= ROW_GROUP_ROWS or self._bytes[shard] >= WRITE_BUFFER_BYTES // self.shards:
            self._flush(shard)

    def _flush(self, shard: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if shard not in self._files:
            # Pictures are compressed already; the other columns are small and repetitive.
            compression = {name: "NONE" if name == "image" else "ZSTD" for name in schema().names}
            compression["captions.list.element"] = compression.pop("captions")
            dictionary = ["mode", "split", "licence", "source"]
            self._files[shard] = pq.ParquetWriter(
                self.folder / f"shard-{shard}.parquet", schema(), compression=compression, use_dictionary=dictionary
            )
        rows = self._pending.pop(shard)
        columns = [pa.array([row[field.name] for row in rows], field.type) for field in schema()]
        self._files[shard].write_table(pa.table(columns, schema=schema()))
        self._bytes[shard] = 0

    def close(self) -> dict[str, Any]:
        """Write what is pending and return the counts for the index: shards, rows, splits, captions, content hash."""
        for shard in sorted(self._pending):
            self._flush(shard)
        for file in self._files.values():
            file.close()
        content = hashlib.sha256()
        for key in sorted(self._content):
            content.update(self._content[key])
        return {
            "format": FORMAT,
            "shards": [f"shard-{shard}.parquet" for shard in sorted(self._files)],
            "rows": self.rows,
            "splits": dict(sorted(self.splits.items())),
            "caption_count": self.captions,
            "sha256": content.hexdigest(),
        }


def read_index(images: Path) -> dict[str, Any]:
    """`index.json` of an images folder: format, shards, rows, splits, classes, caption_count, source, licence, sha256,
    inputs, quarantined. Raises `StageError` where it is missing or of another format."""
    try:
        index: dict[str, Any] = json.loads((images / "index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{images} holds no index.json; run 'dvc repro ingest'") from None
    if index.get("format") != FORMAT:
        raise StageError(f"{images} has format {index.get('format')}, not {FORMAT}; run 'dvc repro -f ingest'")
    return index


def require_accepted(accepted: Path) -> dict[str, Any]:
    """The verdict of `validate` on the data. Raises `StageError` unless it says "accepted"."""
    try:
        verdict: dict[str, Any] = json.loads(accepted.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{accepted} does not exist, so the data was not accepted; run 'dvc repro validate'") from None
    if verdict.get("verdict") != "accepted":
        raise StageError(f"{accepted} does not say that the data was accepted; run 'dvc repro validate'")
    return verdict


def read_columns(images: Path, columns: list[str]) -> pa.Table:
    """Columns of all rows, in the order of the shards."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = [pq.read_table(images / shard, columns=columns) for shard in read_index(images)["shards"]]
    return pa.concat_tables(tables) if tables else schema().empty_table().select(columns)


def schema_of(shard: Path) -> pa.Schema:
    """Columns that a shard has, which should be those of `schema`."""
    import pyarrow.parquet as pq

    return pq.read_schema(shard)


def load_pixels(images: Path, split: str, image: ImageParams) -> Samples:
    """One split of an images folder -> pixels, labels and captions, sorted by key.

    Pictures are turned upright, made grey or RGB, cropped to the centre square and resized
    (bilinear, antialiased) to `image.size`, as `encode` does it by the same `decoding.ingested`: no two
    resizes differ. Raises `StageError` where the disk has no room for pixels that are too many for the memory.
    """
    import numpy as np

    where = read_columns(images, ["key", "split"])
    keys = sorted(key for key, its in zip(*where.to_pydict().values(), strict=True) if its == split)
    position = {key: row for row, key in enumerate(keys)}
    pixels = _room((len(keys), image.channels, image.size, image.size))
    labels = np.full(len(keys), -1, np.int64)
    captions: list[list[str]] = [[] for _ in keys]

    def take(row: dict[str, Any]) -> None:
        place = position[row["key"]]
        pixels[place] = decoding.ingested(
            row["image"], row["width"] * row["height"], (image.size, image.size), image.channels
        )
        if row["label"] is not None:
            labels[place] = row["label"]
        captions[place] = row["captions"]

    with (
        tqdm(desc=f"read {split}", total=len(keys), unit="img", mininterval=1, dynamic_ncols=True, delay=2) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,  # decoding lets go of Python's lock
    ):
        for rows in _rows(images, split):
            for _ in pool.map(take, rows):
                bar.update()
    return Samples(pixels, labels, captions, keys)


def _room(shape: tuple[int, ...]) -> np.ndarray:
    """An array uint8 of `shape` that holds anything, in memory or in a file that has no name."""
    import numpy as np

    size = math.prod(shape)
    if size <= IN_MEMORY_BYTES:
        return np.empty(shape, np.uint8)
    folder = workspace.scratch()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            if hasattr(os, "posix_fallocate"):  # not on macOS; a disk that is full later on ends the process
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as error:
            raise StageError(
                f"the pixels of {shape[0]} images take {size / 1e9:.1f} GB, and {folder} has no room for them "
                f"({error.strerror}); free some, let AFTERIMAGE_SCRATCH name a folder on a larger disk, or lower "
                "image.size"
            ) from None
        return np.memmap(file, np.uint8, "r+", shape=shape).view(np.ndarray)


def read_encoded(images: Path, wanted: Collection[str]) -> Iterator[tuple[str, bytes, int]]:
    """(sha256, encoded picture, number of its pixels) of the images with a sha256 in `wanted`, each content once."""
    import pyarrow.parquet as pq

    left = set(wanted)
    for shard in read_index(images)["shards"]:
        file = pq.ParquetFile(images / shard)
        for group in range(file.num_row_groups):
            if left.isdisjoint(file.read_row_group(group, columns=["sha256"]).column(0).to_pylist()):
                continue
            columns = ["sha256", "image", "width", "height"]
            for batch in file.iter_batches(256, row_groups=[group], columns=columns):
                for row in batch.to_pylist():
                    if row["sha256"] in left:
                        left.remove(row["sha256"])
                        yield row["sha256"], row["image"], row["width"] * row["height"]


def _rows(images: Path, split: str) -> Iterator[list[dict[str, Any]]]:
    """The rows of a split, some at a time."""
    import pyarrow.parquet as pq

    columns = ["key", "image", "width", "height", "label", "captions", "split"]
    for shard in read_index(images)["shards"]:
        for batch in pq.ParquetFile(images / shard).iter_batches(256, columns=columns):
            yield [row for row in batch.to_pylist() if row["split"] == split]
