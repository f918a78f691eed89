"""The images that `encode` works on: their bucket, label and captions, and the disk space that their inputs take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.formats import buckets
from tasks.pictures.digests import TYPE, Digests, digests
from tasks.pictures.images import read_columns
from tasks.pictures.index import class_index
from tasks.runtime.disk import require_space

if TYPE_CHECKING:
    from tasks.formats.buckets import Resolution
    from tasks.formats.codec_info import CodecInfo, TextInfo
    from tasks.params import EncodeParams

BFLOAT16_BYTES, INT32_BYTES = 2, 4
ROWS_AT_A_TIME = 4096


@dataclass(frozen=True, slots=True)
class Row:
    """An image without its pixels."""

    key: str
    sha256: str
    bucket: int
    label: int
    """-1 without a label."""
    captions: list[str]
    width: int
    height: int


class Rows:
    """Images of a split, sorted by bucket and key; they lie in columns, and become `Row`s a part at a time.

    A million `Row`s take 1 GB, their columns 0.2.
    """

    def __init__(self, table: pa.Table) -> None:
        """`table` has the columns of `Row`."""
        self.table = table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, part: slice) -> list[Row]:
        start, stop, _ = part.indices(len(self))
        return [Row(**row) for row in self.table.slice(start, stop - start).to_pylist()]

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), ROWS_AT_A_TIME):
            yield from self[start : start + ROWS_AT_A_TIME]

    def strings(self, name: str) -> list[str]:
        """Return a column of strings."""
        return list(self.table[name].to_pylist())

    def digests(self, name: str) -> np.ndarray:
        """Return the digests of a column of strings, S16 [len(self)]."""
        return digests_of(self.table[name])

    def in_bucket(self, bucket: int) -> Rows:
        """Return the rows of one bucket, which lie together."""
        start, stop = np.searchsorted(self.table["bucket"].to_numpy(), [bucket, bucket + 1]).tolist()
        return Rows(self.table.slice(start, stop - start))


def digests_of(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return the digests of a column of strings, S16 [n]."""
    starts = range(0, len(column), ROWS_AT_A_TIME)
    parts = (digests(column.slice(start, ROWS_AT_A_TIME).to_pylist()) for start in starts)
    return np.concatenate([np.empty(0, TYPE), *parts])


class Missing:
    """Images of which something is missing, by a string that names each, with their resolution."""

    def __init__(self, names: np.ndarray, in_buckets: np.ndarray, resolutions: Sequence[Resolution]) -> None:
        """`names` are digests of the strings, S16 [n], in which no string repeats, and `in_buckets` int16 [n]."""
        self.names = Digests(names)
        self._buckets, self._resolutions = in_buckets[np.argsort(names, kind="stable")], resolutions

    def __len__(self) -> int:
        return len(self.names)

    def resolution(self, name: str) -> Resolution:
        """Return the resolution of an image, which must be one of these."""
        return self._resolutions[self._buckets[self.names.numbers([name])[0]]]


def digests_in(splits: Mapping[str, Rows], name: str) -> np.ndarray:
    """Return the digests of a column of strings, S16 [n], of the images of all splits."""
    return np.concatenate([np.empty(0, TYPE), *(rows.digests(name) for rows in splits.values())])


def buckets_in(splits: Mapping[str, Rows]) -> np.ndarray:
    """Return the buckets of the images of all splits, int16 [n]."""
    return np.concatenate([np.empty(0, np.int16), *(rows.table["bucket"].to_numpy() for rows in splits.values())])


def read_rows(images: Path, resolutions: Sequence[Resolution], leave_out: Sequence[str] = ()) -> dict[str, Rows]:
    """Return the images of each split, sorted by bucket and key, without those of the classes `leave_out`.

    Raises:
        StageError: if a class does not exist.
    """
    hidden = [class_index(images, name, "encode.leave_out") for name in leave_out]
    table = read_columns(images, ["key", "split", "sha256", "label", "captions", "height", "width"])
    labels = pc.fill_null(table["label"], -1)
    table = table.set_column(table.schema.get_field_index("label"), "label", labels)
    if hidden:
        table = table.filter(pc.invert(pc.is_in(labels, pa.array(hidden, pa.int64()))))
    table = table.append_column("bucket", pa.array(_buckets(table, resolutions)))
    table = table.sort_by([("split", "ascending"), ("bucket", "ascending"), ("key", "ascending")])
    table = table.combine_chunks()
    pa.default_memory_pool().release_unused()  # the columns in their first order, which are as large
    counts = {count["values"]: count["counts"] for count in pc.value_counts(table["split"]).to_pylist()}
    table, starts = table.drop_columns(["split"]), np.cumsum([0, *counts.values()]).tolist()
    return {split: Rows(table.slice(start, counts[split])) for split, start in zip(counts, starts, strict=False)}


def _buckets(table: pa.Table, resolutions: Sequence[Resolution]) -> np.ndarray:
    """Return the bucket of each image, int16 [n]; it is computed once for each height and width that occurs."""
    sides = np.stack([table[name].to_numpy() for name in ("height", "width")], axis=1)
    distinct, numbers = np.unique(sides, axis=0, return_inverse=True)
    nearest = [buckets.nearest_bucket(height, width, resolutions) for height, width in distinct.tolist()]
    return np.array(nearest, np.int16)[numbers.ravel()]


def input_resolution(resolution: Resolution, codec: CodecInfo) -> Resolution:
    """Convert the resolution of an image to that of the model's input."""
    downscale = codec.size // codec.autoencoder.size if codec.autoencoder else 1
    return resolution[0] // downscale, resolution[1] // downscale


def require_disk_space(
    folder: Path,
    codec: CodecInfo,
    params: EncodeParams,
    resolutions: Sequence[Resolution],
    splits: Mapping[str, Rows],
) -> None:
    """Print the disk space per 100,000 images, and the number of images per bucket, before anything is encoded.

    Raises:
        StageError: if the inputs do not fit on the disk of `folder`.
    """
    counts = [sum(len(rows.in_bucket(bucket)) for rows in splits.values()) for bucket in range(len(resolutions))]
    sides = [input_resolution(resolution, codec) for resolution in resolutions]
    area = sum(height * width * count for (height, width), count in zip(sides, counts, strict=True))
    latent, text = codec.autoencoder, codec.text
    bytes_per_cell = codec.channels
    if latent:
        bytes_per_cell = 2 * (1 + params.horizontal_flip) * latent.channels * BFLOAT16_BYTES
    captions = len(distinct_captions(splits)) if text else 0
    bytes_per_caption = caption_bytes(text, params.captions == "tokens") if text else 0
    line = f"encode: 100,000 images take {bytes_per_cell * area / max(1, sum(counts)) / 10:,.1f} MB"
    if text:
        line += f", 100,000 different captions {bytes_per_caption / 10:,.1f} MB"
    cached = bytes_per_cell * area * (latent is not None)
    cached += bytes_per_caption * captions * (params.captions == "embeddings")
    print(line + (", and as much in the scratch folder" if cached else ""), flush=True)
    if len(resolutions) > 1:
        listed = (f"{width}x{height} {count}" for (height, width), count in zip(resolutions, counts, strict=True))
        print(f"encode: images by bucket: {', '.join(listed)}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, bytes_per_cell * area + bytes_per_caption * captions + cached)


def caption_bytes(text: TextInfo, tokens: bool) -> int:
    """Bytes of a stored caption: its token ids for each tokenizer, or its embeddings."""
    if tokens:
        return (1 + bool(text.pooled)) * text.length * INT32_BYTES
    return (text.length + bool(text.pooled)) * text.width * BFLOAT16_BYTES


def distinct_captions(splits: Mapping[str, Rows]) -> pa.Array:
    """Return every caption once, in the order of its code points."""
    chunks = [chunk for rows in splits.values() for chunk in pc.list_flatten(rows.table["captions"]).chunks]
    return pc.unique(pa.chunked_array(chunks, pa.string())).sort()
