"""A simulated data set: the images of scikit-learn's digits again and again, each with metadata of its own.

    python -m infra.bench.scale.simulated raw FOLDER ROWS       data/raw, for `ingest`
    python -m infra.bench.scale.simulated images FOLDER ROWS    data/images and data/quarantine, for what follows

Every row has its own key, caption and file: a number after the end of a PNG changes its SHA-256 and not its pixels.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.formats import quarantine as quarantines
from tasks.pictures.images import Writer, split_of
from tasks.pictures.index import FILE
from tasks.runtime import atomic
from tasks.sources import digits
from tasks.sources.entry import write_manifest

if TYPE_CHECKING:
    from tasks.pictures.images import ImageRow

GROUP_ROWS = 1024
WORDS = ("small", "large", "old", "new", "bright", "dark", "plain", "round", "thin", "bold", "blue", "faint")
HELD_OUT = 0.01
SHARDS = 16


def rows(count: int, scratch: Path) -> Iterator[ImageRow]:
    """Yield `count` rows; `scratch` is an existing folder."""
    digits.copy(scratch)
    pictures = [entry.data for entry in digits.read(scratch / digits.FILE).entries if entry.data]
    for number in range(count):
        data = pictures[number % len(pictures)] + number.to_bytes(8, "little")
        sha256 = hashlib.sha256(data).hexdigest()
        words = " ".join(WORDS[int(digit, 16) % len(WORDS)] for digit in sha256[:3])
        key = f"part-{number // 10_000:05d}/{number % 10_000:05d}.png"
        yield {
            "key": key,
            "image": data,
            "width": 8,
            "height": 8,
            "mode": "L",
            "label": None,
            "captions": [f"a {words} digit, number {number} of a collection of handwritten ones"],
            "split": split_of(key, HELD_OUT),
            "sha256": sha256,
            "phash": sha256[16:32],
            "safety": None,
            "licence": "CC BY 4.0",
            "source": "simulated",
        }


def write_raw(folder: Path, count: int) -> None:
    """Write what `download` leaves of a data set of the hub."""
    image = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
    schema = pa.schema([pa.field("image", image), pa.field("caption", pa.string())])
    with atomic.writing_folder(folder) as raw:
        file, pending = pq.ParquetWriter(raw / "train-00000.parquet", schema), []
        for row in rows(count, raw):
            pending.append({"image": {"bytes": row["image"], "path": row["key"]}, "caption": row["captions"][0]})
            if len(pending) == GROUP_ROWS:
                file.write_table(pa.Table.from_pylist(pending, schema))
                pending = []
        file.write_table(pa.Table.from_pylist(pending, schema))
        file.close()
        (raw / digits.FILE).unlink()
        columns = {"image": "image", "label": None, "captions": ["caption"], "classes": []}
        write_manifest(raw, "hub", "simulated", "CC BY 4.0", {"columns": columns})


def write_images(folder: Path, quarantine: Path, count: int) -> None:
    """Write what `ingest` leaves: the shards by its own writer, which is the one process that it cannot divide."""
    with atomic.writing_folder(folder) as images, atomic.writing_folder(quarantine) as refused:
        writer = Writer(images, SHARDS)
        for row in rows(count, images):
            writer.add(row)
        (images / digits.FILE).unlink()
        index = writer.close()
        index.write(images / FILE)
        quarantines.Writer(refused).close()
        quarantines.QuarantineIndex(index.rows, index.rows, {}).write(refused / quarantines.INDEX)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m infra.bench.scale.simulated")
    parser.add_argument("what", choices=["raw", "images"], help="before `ingest`, or after it")
    parser.add_argument("target", type=Path, help="folder")
    parser.add_argument("rows", type=int)
    given = parser.parse_args()
    if given.what == "raw":
        write_raw(given.target / "raw", given.rows)
    else:
        write_images(given.target / "images", given.target / "quarantine", given.rows)
