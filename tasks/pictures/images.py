"""The dataset format: Parquet shards of encoded images with metadata, written by `ingest`, read by every later stage.

data/images/shard-<hex>.parquet    rows whose key has a SHA-256 that begins with <hex>
data/images/conditioning/          maps.parquet: control maps that the user gave for the images, by key
data/images/index.json             see `tasks.pictures.index`
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import resource
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from models.hashing import file_sha256
from tasks.pictures import decoding, spooled
from tasks.pictures.content import ContentHash, SortedPairs
from tasks.pictures.digests import Digests, Places, digests, filled
from tasks.pictures.index import ImageIndex, read_index
from tasks.pictures.samples import Samples, Split
from tasks.pictures.spooled import PART_ROWS, Column
from tasks.runtime import integrity, workspace
from tasks.runtime.errors import StageError
from tasks.runtime.progress import progress

if TYPE_CHECKING:
    from tasks.params import ImageParams
    from tasks.pictures.spooled import SpooledTable

PICTURE = "image.bytes"
"""Column of the encoded images: a struct of bytes and path, like the feature `Image` of Hugging Face `datasets`."""
ROW_GROUP_ROWS = 1024
WRITE_BUFFER_BYTES = 128 << 20
LEAST_GROUP_BYTES = 128 << 10
DIGITS = {1: 0, 16: 1, 256: 2, 4096: 3}
"""Number of shards -> digits of the hash of a key that choose the shard."""
SPARE_FILES = 128
"""Files that a stage has open beside the shards, at most."""
MAPS, MAP_ROWS = "conditioning/maps.parquet", 64
MAP_SCHEMA = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in (("key", pa.string()), ("image", pa.binary()), ("sha256", pa.string()))
    ]
)
"""Columns of `MAPS`."""
IN_MEMORY_BYTES = 1 << 30
"""Larger pixel arrays are memory-mapped, see `Samples`."""


class ImageRow(TypedDict):
    """One image of the dataset; the keys are the columns of `schema`."""

    key: str
    image: bytes
    """The encoded image."""
    width: int
    height: int
    mode: str
    label: int | None
    captions: list[str]
    split: str
    sha256: str
    phash: str
    safety: str | None
    licence: str
    source: str


def schema() -> pa.Schema:
    """Columns of a shard."""
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("image", pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])),
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


def published_schema(classes: list[str]) -> pa.Schema:
    """Columns of a shard, with the features `Image` and `ClassLabel` declared for Hugging Face `datasets`."""
    features: dict[str, dict[str, object]] = {"image": {"_type": "Image"}}
    if classes:
        features["label"] = {"_type": "ClassLabel", "names": classes}
    return schema().with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


@functools.lru_cache(maxsize=1)
def key_hash(key: str) -> str:
    """SHA-256 of a key: the first digits choose the shard, the last 8 the split.

    The cache of one entry serves `split_of` and `Writer.add`, which are called one after the other for each key.
    """
    return hashlib.sha256(key.encode("utf-8")).hexdigest()


def split_of(key: str, held_out_fraction: float) -> str:
    """The split of an image whose source publishes none: "test" for the fraction `held_out_fraction` of all keys."""
    return "test" if int(key_hash(key)[-8:], 16) < held_out_fraction * 2**32 else "train"


@dataclass
class Writer:
    """Writes rows into `shards` Parquet files (1, 16, 256 or 4096) in `folder`.

    A shard keeps the order in which rows were added. Memory is bounded: the rows of a shard are flushed as one row
    group at `ROW_GROUP_ROWS` rows or at their part of `WRITE_BUFFER_BYTES`, which is at least `LEAST_GROUP_BYTES`.
    """

    folder: Path
    shards: int
    classes: list[str] = field(default_factory=list)
    """Class names in the order of the labels."""
    rows: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    captions: int = 0
    _pending: dict[str, list[ImageRow]] = field(default_factory=dict)
    _bytes: dict[str, int] = field(default_factory=dict)
    _files: dict[str, pq.ParquetWriter] = field(default_factory=dict)
    _content: ContentHash = field(init=False)

    def __post_init__(self) -> None:
        allow_open_files(self.shards)
        self._content = ContentHash(self.folder)

    def add(self, row: ImageRow) -> None:
        """Add one row."""
        shard = key_hash(row["key"])[: DIGITS[self.shards]] or "0"
        self._pending.setdefault(shard, []).append(row)
        self._bytes[shard] = self._bytes.get(shard, 0) + len(row["image"])
        self.rows += 1
        self.splits[row["split"]] = self.splits.get(row["split"], 0) + 1
        self.captions += len(row["captions"])
        identity = [row["key"], row["sha256"], row["split"], row["label"], row["captions"]]
        self._content.add(row["key"], identity)
        buffer = max(WRITE_BUFFER_BYTES // self.shards, LEAST_GROUP_BYTES)
        if len(self._pending[shard]) >= ROW_GROUP_ROWS or self._bytes[shard] >= buffer:
            self._flush(shard)

    def _flush(self, shard: str) -> None:
        if shard not in self._files:
            # Images are compressed already; the other columns are small and repetitive.
            compression = {name: "ZSTD" for name in schema().names if name != "image"}
            compression |= {PICTURE: "NONE", "image.path": "ZSTD"}
            compression["captions.list.element"] = compression.pop("captions")
            self._files[shard] = pq.ParquetWriter(
                self.folder / f"shard-{shard}.parquet",
                published_schema(self.classes),
                compression=compression,
                use_dictionary=["mode", "split", "licence", "source"],
            )
        rows = self._pending.pop(shard)
        encoded = pa.array([row["image"] for row in rows], pa.binary())
        image_type = schema().field("image").type
        image = pa.StructArray.from_arrays([encoded, pa.nulls(len(rows), pa.string())], fields=list(image_type))
        columns = pa.Table.from_pylist(list(rows), schema().remove(schema().get_field_index("image")))
        arrays = [image if name == "image" else columns[name].combine_chunks() for name in schema().names]
        self._files[shard].write_table(pa.table(arrays, schema=published_schema(self.classes)))
        self._bytes[shard] = 0

    def close(self) -> ImageIndex:
        """Write the remaining rows and return the index of the shards, without what only the source knows."""
        for shard in sorted(self._pending):
            self._flush(shard)
        for file in self._files.values():
            file.close()
        return ImageIndex(
            shards=[f"shard-{shard}.parquet" for shard in sorted(self._files)],
            files=integrity.checksums(self.folder, "shard-*.parquet"),
            rows=self.rows,
            splits=dict(sorted(self.splits.items())),
            caption_count=self.captions,
            sha256=self._content.hexdigest(),
            classes=self.classes,
        )


def allow_open_files(count: int) -> None:
    """Raise the limit of open files of this process to `count` and some more.

    Raises:
        StageError: if the system does not allow it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise StageError(f"{count} shards need {wanted} open files, and {hard} are allowed; lower ingest.shards")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@dataclass
class MapWriter:
    """Writes the control maps that a source has for its images into `folder`; without any, no file is written."""

    folder: Path
    count: int = 0
    _pending: list[dict[str, Any]] = field(default_factory=list)
    _file: pq.ParquetWriter | None = None
    _content: SortedPairs = field(init=False)

    def __post_init__(self) -> None:
        self._content = SortedPairs(self.folder)

    def add(self, key: str, data: bytes) -> None:
        """Add the map of the image `key`, an encoded image."""
        sha256 = hashlib.sha256(data).hexdigest()
        self._pending.append({"key": key, "image": data, "sha256": sha256})
        self._content.add(key, sha256.encode())
        self.count += 1
        if len(self._pending) >= MAP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._file is None:
            (self.folder / MAPS).parent.mkdir()
            self._file = pq.ParquetWriter(self.folder / MAPS, MAP_SCHEMA, compression="NONE")
        self._file.write_table(pa.Table.from_pylist(self._pending, MAP_SCHEMA))
        self._pending = []

    def close(self, index: ImageIndex) -> ImageIndex:
        """Write the remaining maps; returns the index with their file and with a content hash that covers them."""
        if not self.count:
            return index
        if self._pending:
            self._flush()
        if self._file is not None:
            self._file.close()
        # The hash of the JSON of [index.sha256, [[key, sha256], ...]].
        content, separator = hashlib.sha256(f"[{json.dumps(index.sha256)}, [".encode()), ""
        for key, sha256 in self._content.read():
            content.update(f"{separator}{json.dumps([key.decode(), sha256.decode()])}".encode())
            separator = ", "
        content.update(b"]]")
        maps = {MAPS: file_sha256(self.folder / MAPS)}
        return replace(index, files=index.files | maps, sha256=content.hexdigest())


def map_hashes(images: Path) -> dict[str, str]:
    """Return key -> SHA-256 of the control map of each image that the user gave one for."""
    if MAPS not in read_index(images).files:
        return {}
    integrity.require(images, {MAPS: read_index(images).files[MAPS]}, "ingest")
    table = pq.read_table(images / MAPS, columns=["key", "sha256"])
    return dict(zip(table["key"].to_pylist(), table["sha256"].to_pylist(), strict=True))


def read_maps(images: Path, wanted: Collection[str] | Digests) -> Iterator[tuple[str, str, bytes]]:
    """Yield (key, sha256, encoded map) of the images whose key is in `wanted`."""
    wanted = wanted if isinstance(wanted, Digests) else Digests(digests(wanted))
    for batch in pq.ParquetFile(images / MAPS).iter_batches(MAP_ROWS):
        numbers = wanted.numbers(batch.column("key").to_pylist())
        for row in batch.take(pa.array(np.flatnonzero(numbers >= 0))).to_pylist():
            yield row["key"], row["sha256"], row["image"]


def shards(images: Path) -> list[Path]:
    """The Parquet files of an images folder. Raises `StageError` if one is missing or damaged."""
    index = read_index(images)
    integrity.require(images, index.files, "ingest")
    return [images / name for name in index.shards]


def read_columns(images: Path, columns: list[str], chosen: Collection[Path] | None = None) -> pa.Table:
    """Read columns of all rows, in the order of the shards; "image" becomes a binary column of the encoded images.

    With `chosen` only these shards are read.
    """
    files = [file for file in shards(images) if chosen is None or file in chosen]
    if "image" not in columns:
        tables = [pq.read_table(file, columns=columns) for file in files]
        return pa.concat_tables(tables) if tables else schema().empty_table().select(columns)
    stored = [PICTURE if name == "image" else name for name in columns]
    tables = [pq.ParquetFile(file).read(columns=stored) for file in files]
    table = pa.concat_tables(tables) if tables else schema().empty_table()
    place = table.schema.get_field_index("image")
    return table.set_column(place, "image", pc.struct_field(table["image"], "bytes")).select(columns)


def iter_columns(images: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield columns of all rows without their images, in the order of the shards, at most `PART_ROWS` at a time."""
    for shard in shards(images):
        with pq.ParquetFile(shard) as file:
            for batch in file.iter_batches(PART_ROWS, columns=list(columns)):
                yield pa.Table.from_batches([batch]).select(columns)


def enlarged(count: int, resolution: int) -> str:
    """Message about the `count` images whose shorter side is below the resolution of the model; empty for none."""
    return f"{count} images are smaller than image.resolution {resolution} and are enlarged" if count else ""


def schema_of(shard: Path) -> pa.Schema:
    """Columns found in a shard."""
    return pq.read_schema(shard)


def load_pixels(
    images: Path, split: str, image: ImageParams, chosen: Callable[[Split], np.ndarray] | None = None
) -> Samples:
    """Decode one split of an images folder -> pixels, labels and captions, sorted by key.

    Images are turned upright, converted to grey or RGB, cropped to the centre square and resized (bilinear,
    antialiased) to `image.resolution`, by the same `decoding.decode_resized` as in `encode`.
    With `chosen` only the rows that it returns for the split are decoded, see `Samples.rows`.
    Raises `StageError` if the pixels exceed `IN_MEMORY_BYTES` and the disk has no space for them.
    """

    def of_split(columns: Sequence[str]) -> Iterator[pa.Table]:
        for table in iter_columns(images, [*columns, "split"]):
            yield table.filter(pc.equal(table["split"], split)).select(columns)

    table = spooled.sort(of_split, ["key", "label", "captions"], ["key"])
    labels = np.empty(len(table), np.int64)
    starts = itertools.accumulate(map(len, table.batches()), initial=0)
    for start, batch in zip(starts, table.batches(), strict=False):
        labels[start : start + len(batch)] = batch.column("label").fill_null(-1).to_numpy()
    known = Split(labels, Column(table, "captions"), Column(table, "key"))
    rows = None if chosen is None else np.unique(chosen(known))
    places = Places(_digests_of_keys(table, rows))
    pixels = allocate((len(places), image.channels, image.resolution, image.resolution))

    def take(found: tuple[int, dict[str, Any]]) -> None:  # the columns have several types
        place, row = found
        pixels[place] = decoding.decode_resized(
            row["image"]["bytes"], row["width"] * row["height"], (image.resolution, image.resolution), image.channels
        )

    with (
        progress(desc=f"read {split}", total=len(places), unit="img", delay=2) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,  # decoding releases the global interpreter lock
    ):
        for batch in _encoded_rows(images, places):
            for _ in pool.map(take, batch):
                bar.update()
    return Samples(known.labels, known.captions, known.keys, pixels, rows)


def _digests_of_keys(table: SpooledTable, rows: np.ndarray | None) -> np.ndarray:
    """Return the digests of the keys of a table, S16 [n], or of `rows` of it, which ascend."""
    if rows is None:
        return filled((batch.column("key").to_pylist() for batch in table.batches()), len(table))

    def chosen(rows: np.ndarray) -> Iterator[list[str]]:
        start = 0
        for batch in table.batches():
            own = rows[slice(*np.searchsorted(rows, [start, start + len(batch)]))]
            yield batch.column("key").take(pa.array(own - start)).to_pylist()
            start += len(batch)

    return filled(chosen(rows), len(rows))


def allocate(shape: tuple[int, ...]) -> np.ndarray:
    """Return an uninitialised uint8 array, in memory or memory-mapped from an unnamed file.

    Raises:
        StageError: if it exceeds `IN_MEMORY_BYTES` and the disk has no space for it.
    """
    size = math.prod(shape)
    if size <= IN_MEMORY_BYTES:
        return np.empty(shape, np.uint8)
    with unnamed_file(size, f"the pixels of {shape[0]} images") as file:
        return np.memmap(file, np.uint8, "r+", shape=shape).view(np.ndarray)


def unnamed_file(size: int, what: str) -> IO[bytes]:
    """Open a new file of `size` bytes in the scratch folder, which is deleted when it is closed.

    Raises:
        StageError: if the disk has no space for it, which is for `what`.
    """
    file = workspace.scratch_file()
    try:
        if hasattr(os, "posix_fallocate") and size:  # not on macOS, where a disk that fills up kills the process
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
    except OSError as error:
        file.close()
        raise StageError(
            f"{what} need {size / 1e9:.1f} GB, and {workspace.scratch()} has no space for them ({error.strerror}); "
            "free some, set AFTERIMAGE_SCRATCH to a folder on a larger disk, or lower image.resolution"
        ) from None
    return file


def read_encoded(images: Path, wanted: Collection[str] | Digests) -> Iterator[tuple[str, bytes, int]]:
    """Yield (sha256, encoded image, width * height) of the images with a SHA-256 in `wanted`, each content once."""
    wanted = wanted if isinstance(wanted, Digests) else Digests(digests(wanted))
    left = np.ones(len(wanted) + 1, np.bool_)
    left[-1] = False  # of the number -1, which images that are not wanted have
    for shard in shards(images):
        file = pq.ParquetFile(shard)
        for group in range(file.num_row_groups):
            numbers = wanted.numbers(file.read_row_group(group, columns=["sha256"]).column(0).to_pylist())
            if not left[numbers].any():
                continue
            columns, start = ["sha256", PICTURE, "width", "height"], 0
            for batch in file.iter_batches(256, row_groups=[group], columns=columns):
                of_batch = numbers[start : start + len(batch)]
                start += len(batch)
                chosen = np.flatnonzero(left[of_batch])
                for number, row in zip(
                    of_batch[chosen].tolist(), batch.take(pa.array(chosen)).to_pylist(), strict=True
                ):
                    if left[number]:  # equal images of a batch
                        left[number] = False
                        yield row["sha256"], row["image"]["bytes"], row["width"] * row["height"]


def _encoded_rows(
    images: Path, keys: Places
) -> Iterator[list[tuple[int, dict[str, Any]]]]:  # the columns have several types
    """Yield the encoded images of these keys in batches, each after its place; other row groups are skipped."""
    for shard in shards(images):
        file = pq.ParquetFile(shard)
        for group in range(file.num_row_groups):
            places = keys.first(digests(file.read_row_group(group, columns=["key"]).column(0).to_pylist()))
            if (places < 0).all():
                continue
            start = 0
            for batch in file.iter_batches(256, row_groups=[group], columns=["key", PICTURE, "width", "height"]):
                of_batch = places[start : start + len(batch)]
                start += len(batch)
                chosen = np.flatnonzero(of_batch >= 0)
                yield list(zip(of_batch[chosen].tolist(), batch.take(pa.array(chosen)).to_pylist(), strict=True))
