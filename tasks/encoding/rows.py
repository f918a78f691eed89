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
from tasks.pictures import spooled
from tasks.pictures.digests import Digests, filled
from tasks.pictures.images import iter_columns
from tasks.pictures.index import class_index
from tasks.runtime.disk import require_space

if TYPE_CHECKING:
    from tasks.formats.buckets import Resolution
    from tasks.formats.codec_info import CodecInfo, TextInfo
    from tasks.params import EncodeParams
    from tasks.pictures.spooled import SpooledTable

BFLOAT16_BYTES, INT32_BYTES = 2, 4


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
    """Images of a split, sorted by bucket and key; they lie in a file, and become `Row`s a part at a time."""

    def __init__(self, table: SpooledTable, counts: Sequence[int]) -> None:
        """`table` has the columns of `Row`, and `counts` are the rows of each bucket."""
        self.table, self.counts = table, counts

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, part: slice) -> list[Row]:
        start, stop, _ = part.indices(len(self))
        return [Row(**row) for row in self.table.slice(start, stop).read().to_pylist()]

    def __iter__(self) -> Iterator[Row]:
        for batch in self.table.batches():
            yield from (Row(**row) for row in batch.to_pylist())

    def strings(self, name: str) -> Iterator[str]:
        """Yield a column of strings."""
        return self.table.strings(name)

    def digests(self, name: str) -> np.ndarray:
        """Return the digests of a column of strings, S16 [len(self)]."""
        return digests_of(self.table, name)

    def in_bucket(self, bucket: int) -> Rows:
        """Return the rows of one bucket, which lie together."""
        start, count = sum(self.counts[:bucket]), self.counts[bucket]
        only = [count if number == bucket else 0 for number in range(len(self.counts))]
        return Rows(self.table.slice(start, start + count), only)


def digests_of(table: SpooledTable, name: str) -> np.ndarray:
    """Return the digests of a column of strings, S16 [n]."""
    return filled((batch.column(name).to_pylist() for batch in table.batches()), len(table))


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
    batches = (batch.column(name).to_pylist() for rows in splits.values() for batch in rows.table.batches())
    return filled(batches, sum(map(len, splits.values())))


def buckets_in(splits: Mapping[str, Rows]) -> np.ndarray:
    """Return the buckets of the images of all splits, int16 [n]."""
    numbers = (np.repeat(np.arange(len(rows.counts), dtype=np.int16), rows.counts) for rows in splits.values())
    return np.concatenate([np.empty(0, np.int16), *numbers])


def read_rows(images: Path, resolutions: Sequence[Resolution], leave_out: Sequence[str] = ()) -> dict[str, Rows]:
    """Return the images of each split, sorted by bucket and key, without those of the classes `leave_out`.

    Raises:
        StageError: if a class does not exist.
    """
    hidden = pa.array([class_index(images, name, "encode.leave_out") for name in leave_out], pa.int64())

    def source(columns: Sequence[str]) -> Iterator[pa.Table]:
        stored = [name for name in dict.fromkeys([*columns, "label", "height", "width"]) if name != "bucket"]
        for table in iter_columns(images, stored):
            labels = pc.fill_null(table["label"], -1)
            table = table.set_column(table.schema.get_field_index("label"), "label", labels)
            table = table.append_column("bucket", pa.array(_buckets(table, resolutions)))
            yield table.filter(pc.invert(pc.is_in(labels, hidden))).select(columns)

    columns = ["key", "sha256", "label", "captions", "height", "width", "bucket"]
    table = spooled.sort(source, ["split", *columns], ["split", "bucket", "key"])
    counts: dict[str, np.ndarray] = {}
    for batch in table.batches():
        for split in batch.column("split").unique().to_pylist():
            own = batch.filter(pc.equal(batch.column("split"), split)).column("bucket").to_numpy()
            counts[split] = counts.get(split, 0) + np.bincount(own, minlength=len(resolutions))
    found, start = {}, 0
    for split, in_buckets in counts.items():
        stop = start + int(in_buckets.sum())
        found[split] = Rows(table.slice(start, stop).select(columns), in_buckets.tolist())
        start = stop
    return found


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
    distinct: SpooledTable | None,
) -> None:
    """Print the disk space per 100,000 images, and the number of images per bucket, before anything is encoded.

    `distinct` are the distinct captions; None without text.

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
    captions = len(distinct) if distinct else 0
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


def distinct_captions(splits: Mapping[str, Rows]) -> SpooledTable:
    """Return every caption once, in the order of its code points: a table with the column `caption`."""

    def source(columns: Sequence[str]) -> Iterator[pa.Table]:
        for rows in splits.values():
            for batch in rows.table.batches():
                yield pa.table([pc.list_flatten(batch.column("captions"))], names=columns)

    return spooled.sort(source, ["caption"], ["caption"], distinct=True)
