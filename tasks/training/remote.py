"""Shards of the training data in an S3 bucket, read by ranges: the batches of a local data set, without a copy of it.

A shard is opened by its header. Columns with small rows (labels, captions, sizes) are read whole; of the others, each
batch reads the blocks of its rows, in parallel and before it is needed (`stores.Streamed`). Which rows a batch has is
decided as for local data, so the order depends neither on the number of connections nor on that of processes.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from botocore.exceptions import BotoCoreError

from tasks.formats import latents
from tasks.params import LOCAL, S3Params
from tasks.runtime.errors import StageError
from tasks.training import stores
from tasks.training.stores import Store, Streamed, fitting, rows_of
from tasks.transfer import objects

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tasks.formats.latents import Shard
    from tasks.params import TrainParams

CONNECTIONS = 16
BLOCK_BYTES = 64 << 10
"""Least bytes of a request, if a row has fewer."""
WHOLE_ROW_BYTES = 32
"""Columns with at most this many bytes per row are read whole when a shard is opened: labels, sizes, 8 captions."""
HEADER_BYTES = 16 << 10
"""Bytes of a shard that are read first; the header is seldom longer."""


@dataclass(frozen=True)
class Column:
    """A column of a shard in the bucket."""

    key: str
    """Of the object."""
    etag: str
    start: int
    """First byte in the object."""
    dtype: str
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape[1:], dtype=np.int64))

    @property
    def block_rows(self) -> int:
        """Rows that are read at once."""
        return max(1, BLOCK_BYTES // max(1, self.row_bytes))

    @property
    def nbytes(self) -> int:
        """Bytes of the column."""
        return self.row_bytes * len(self)


Block: TypeAlias = tuple[Column, int]
"""A column and the number of a block in it."""
RemoteShard: TypeAlias = "dict[str, Column | np.ndarray]"


class Bucket:
    """The folder of latents at `address` (s3://bucket/prefix); AWS_ENDPOINT_URL selects another server than Amazon's.

    Blocks are kept in memory until they take `cache_bytes`, and then those read first stay: every epoch reads each row
    once, so that no choice of blocks serves it better than another.
    """

    def __init__(self, address: str, cache_bytes: int) -> None:
        self.address, self.cache_bytes = address.rstrip("/"), cache_bytes
        self.bucket, self.prefix = objects.split(self.address)
        self.client = objects.client(S3Params(connections=CONNECTIONS))
        self.requests = 0
        """Ranges that were read."""
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="s3")
        self._kept, self._kept_bytes, self._lock = dict[Block, np.ndarray](), 0, threading.Lock()

    def open(self, shards: Sequence[Shard]) -> list[RemoteShard]:
        """Open shards that the index lists.

        Raises:
            StageError: if one is missing, or is not the one that the index lists.
        """
        return list(self._pool.map(self._opened, shards))

    def _opened(self, shard: Shard) -> RemoteShard:
        key, url = "/".join(part for part in (self.prefix, shard.file) if part), f"{self.address}/{shard.file}"
        with objects.explained(url):
            head = self.client.head_object(Bucket=self.bucket, Key=key)
        if head["Metadata"].get("sha256") != shard.sha256:
            raise StageError(
                f"{url} is not the shard that data/latents/index.json lists; upload it with "
                f"'python -m infra.upload_latents {self.address}', or set train.data to 'local'"
            )
        etag, first = head["ETag"], min(HEADER_BYTES, head["ContentLength"])
        begin = self._range(key, etag, 0, first)
        length = int.from_bytes(begin[:8], "little")
        if 8 + length > first:
            begin += self._range(key, etag, first, 8 + length)
        columns: RemoteShard = {}
        for name, entry in latents.tensors_of(json.loads(begin[8 : 8 + length])).items():
            column = Column(key, etag, 8 + length + entry.start, entry.dtype, entry.shape)
            columns[name] = self._whole(column) if column.row_bytes <= WHOLE_ROW_BYTES else column
        return columns

    def _whole(self, column: Column) -> np.ndarray:
        data = self._range(column.key, column.etag, column.start, column.start + column.nbytes) if len(column) else b""
        return np.frombuffer(data, column.dtype).reshape(column.shape)

    def blocks(self, wanted: Iterable[Block]) -> dict[Block, np.ndarray]:
        """Return blocks, each [at most `block_rows`, ...]; those that are not in memory are read in parallel."""
        distinct = list(dict.fromkeys(wanted))
        return dict(zip(distinct, self._pool.map(self._block, distinct), strict=True))

    def _block(self, block: Block) -> np.ndarray:
        if (known := self._kept.get(block)) is not None:
            return known
        column, number = block
        first = number * column.block_rows
        rows = min(column.block_rows, len(column) - first)
        start = column.start + first * column.row_bytes
        data = self._range(column.key, column.etag, start, start + rows * column.row_bytes)
        array = np.frombuffer(data, column.dtype).reshape(rows, *column.shape[1:])
        with self._lock:
            if block not in self._kept and self._kept_bytes + array.nbytes <= self.cache_bytes:
                self._kept[block] = array
                self._kept_bytes += array.nbytes
        return array

    def _range(self, key: str, etag: str, start: int, end: int) -> bytes:
        """Read the bytes from `start` to before `end` of a version of an object; broken connections are tried again."""
        with objects.explained(f"s3://{self.bucket}/{key}"):
            for attempt in range(1, objects.ATTEMPTS + 1):
                try:
                    answer = self.client.get_object(
                        Bucket=self.bucket, Key=key, Range=f"bytes={start}-{end - 1}", IfMatch=etag
                    )
                    data = bytes(answer["Body"].read())
                except (BotoCoreError, OSError):
                    if attempt == objects.ATTEMPTS:
                        raise
                else:
                    if len(data) == end - start:
                        with self._lock:
                            self.requests += 1
                        return data
                time.sleep(objects.PAUSE_SECONDS * attempt)
        raise StageError(f"s3://{self.bucket}/{key} ends early; run 'python -m infra.upload_latents {self.address}'")


class Remote(Streamed):
    """Shards in a bucket; the next batch is read while the device works on the current one."""

    where = "streamed from S3"

    def __init__(self, bucket: Bucket, shards: Sequence[RemoteShard], device: torch.device) -> None:
        # It reads the length and the shapes of the columns.
        super().__init__(shards, device)  # type: ignore[arg-type]
        self.bucket, self.remote = bucket, shards
        self.starts = np.cumsum([0, *(len(next(iter(shard.values()))) for shard in shards)])

    def on_host(self, name: str, rows: Tensor) -> np.ndarray:
        return self._columns(rows.numpy(), [name])[name]

    def _arrays(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return self._columns(rows, list(self.shapes))

    def _columns(self, rows: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Return rows int64 [B] of columns, reading all blocks that they need at once."""
        shard_of = np.searchsorted(self.starts, rows, "right") - 1
        places = [(int(shard), int(row - self.starts[shard])) for shard, row in zip(shard_of, rows, strict=True)]
        read = [name for name in names if isinstance(self.remote[0][name], Column)]
        wanted = {name: [self._place(name, *place) for place in places] for name in read}
        blocks = self.bucket.blocks(block for listed in wanted.values() for block, _ in listed)
        columns = {name: np.stack([blocks[block][row] for block, row in listed]) for name, listed in wanted.items()}
        return {
            name: columns[name] if name in columns else rows_of([shard[name] for shard in self.shards], rows)
            for name in names
        }

    def _place(self, name: str, shard: int, row: int) -> tuple[Block, int]:
        """Return the block of a row, and its number in that block."""
        column = self.remote[shard][name]
        assert isinstance(column, Column), "the columns of all shards are read alike"
        number, within = divmod(row, column.block_rows)
        return (column, number), within


def bucket_of(params: TrainParams) -> Bucket | None:
    """Return the bucket that `train.data` names; None for local data."""
    return None if params.data == LOCAL else Bucket(params.data, params.data_cache_bytes)


def open_store(
    data: Path, split: str, where: str, device: torch.device, bucket: int = latents.SQUARE, remote: Bucket | None = None
) -> Store:
    """Open one bucket of a split as `stores.open_store` does, or in `remote`; the index of the latents is local."""
    if remote is None:
        return stores.open_store(data, split, where, device, bucket)
    return Remote(remote, remote.open(latents.shards_of(data, split, bucket)), device)


def open_texts(data: Path, where: str, device: torch.device, remote: Bucket | None = None) -> Store | None:
    """Open the captions, locally or in `remote`; None without text."""
    listed = latents.read_index(data).texts
    if not listed:
        return None
    return Remote(remote, remote.open(listed), device) if remote else fitting(latents.open_texts(data), where, device)
