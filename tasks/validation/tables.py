"""The tables that `validate` checks, built from the columns of the shards, with their gates."""

from __future__ import annotations

import functools
import itertools
import json
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tasks.formats.quarantine import FILE as QUARANTINE_FILE
from tasks.pictures import colours, spooled
from tasks.pictures.digests import digests
from tasks.pictures.images import enlarged, iter_columns, schema, schema_of
from tasks.runtime.errors import StageError
from tasks.runtime.progress import progress
from tasks.sources.entry import CAPTIONS_NOT_READ, NO_IMAGE_FILE
from tasks.validation import checks, demands, duplicates
from tasks.validation.expectations import Table
from tasks.validation.writing_systems import Reader

if TYPE_CHECKING:
    from tasks.params import Demands, ValidateParams
    from tasks.pictures.index import ImageIndex
    from tasks.pictures.spooled import SpooledTable

Rows: TypeAlias = NDArray[np.int64]
Number = TypeVar("Number", np.uint8, np.uint64)
PART_ROWS = 100_000
"""Images that are judged at a time."""
TRAIN = 0
HASH = r"\A[0-9a-f]{16}\z"
METADATA = (
    "key",
    "width",
    "height",
    "mode",
    "label",
    "split",
    "sha256",
    "phash",
    "licence",
    "source",
    "safety",
    "captions",
)
"""Columns of the table of images."""


@dataclass(frozen=True)
class Baseline:
    """The dataset that was accepted before, for the comparison of the label balance."""

    source: str | None
    labels: dict[str, int]
    """Number of images by class; empty for no comparison."""


def build(
    images: Path,
    quarantine: Path,
    index: ImageIndex,
    counts: dict[str, int],
    params: ValidateParams,
    asked: Demands,
) -> Iterator[Table]:
    """Yield all tables with their gates; only that of the columns if a shard has other columns than expected.

    `counts` is the number of images by class.
    """
    columns = _columns(images, index.shards)
    yield Table("columns", columns, checks.column_gates())
    if not (columns["found"] == columns["expected"]).all():
        return  # the rows of such shards cannot be read
    extremes, small = _extremes(images, asked.resolution)
    notes = {"size": enlarged(small, asked.resolution), "mode": "; ".join(colours.sentences(index.profiles))}
    gates = demands.row_gates(index, asked, checks.row_gates(index, extremes, params))
    gates = [replace(gate, note=notes.get(gate.check, "")) for gate in gates]
    parts = _parts(spooled.sort(functools.partial(iter_columns, images), METADATA, ["key"]))
    numbers: Iterable[int | None] = [None] if len(parts) == 1 else range(1, len(parts) + 1)
    # `map` keeps no part while the next one is made, as a variable of a loop would.
    yield from map(lambda number, rows: Table("images", rows, gates, number), numbers, _rows(parts, params))
    of_inputs = checks.input_gates(params)
    inputs = _inputs(images, list(map(len, parts)), quarantine)
    yield from map(lambda number, rows: Table("inputs", rows, of_inputs, number), numbers, inputs)
    if index.caption_files:
        files = pd.DataFrame([asdict(file) for file in index.caption_files])
        yield Table("caption files", files, checks.caption_file_gates())
    if index.classes:
        yield Table("classes", _classes(counts), checks.class_gates(params))
    yield from demands.tables(images, index, asked)
    before = _baseline(Path(params.baseline))
    if index.classes and before.labels and before.source == index.source:
        balance = _balance(counts, before.labels)
        yield Table("balance", balance, checks.balance_gates(balance, params))


def label_counts(images: Path, classes: list[str]) -> dict[str, int]:
    """Number of images by class."""
    found: Counter[int | None] = Counter()
    for table in iter_columns(images, ["label"]):
        found.update({value["values"]: value["counts"] for value in pc.value_counts(table["label"]).to_pylist()})
    return {name: found[label] for label, name in enumerate(classes)}


def _columns(images: Path, shards: list[str]) -> pd.DataFrame:
    """One row per column of each shard: the type found and the type expected, "missing" for absent columns."""
    expected = {field.name: _type(field) for field in schema()}
    rows = []
    for shard in shards:
        found = {field.name: _type(field) for field in schema_of(images / shard)}
        rows += [
            (f"{shard}: {name}", found.get(name, "missing"), expected.get(name, "missing"))
            for name in dict.fromkeys([*expected, *found])
        ]
    return pd.DataFrame(rows, columns=["key", "found", "expected"])


def _type(field: pa.Field) -> str:
    """Type of a column as text. List types are simplified, because Parquet and Arrow name their items differently."""
    return f"list of {field.type.value_type}" if pa.types.is_list(field.type) else str(field.type)


def _parts(table: SpooledTable) -> list[SpooledTable]:
    """Divide rows that are sorted by key into parts of `PART_ROWS` rows; a key is in one part only."""
    cuts = [0]
    while cuts[-1] < len(table):
        stop = min(cuts[-1] + PART_ROWS, len(table))
        (last,) = table.slice(stop - 1, stop).strings("key")
        after = table.slice(stop, len(table)).strings("key")
        cuts.append(stop + sum(1 for _ in itertools.takewhile(functools.partial(operator.eq, last), after)))
    return [table.slice(start, stop) for start, stop in itertools.pairwise(cuts)] or [table]


def _extremes(images: Path, resolution: int) -> tuple[checks.Extremes, int]:
    """Return the extremes of all images, and how many are smaller than `resolution`."""
    least, longest, small = math.inf, 1.0, 0
    for table in iter_columns(images, ["width", "height"]):
        sides = np.stack([table[name].to_numpy() for name in ("width", "height")])
        shorter = sides.min(axis=0)
        if len(shorter):
            least = min(least, int(shorter.min()))
            longest = max(longest, float((sides.max(axis=0) / shorter).max()))
            small += int((shorter < resolution).sum())
    return checks.Extremes(0 if least == math.inf else int(least), longest), small


def _rows(parts: Sequence[SpooledTable], params: ValidateParams) -> Iterator[pd.DataFrame]:
    """Yield one row per image, part by part: metadata and derived columns."""
    rated = any(batch.column("safety").null_count < len(batch) for part in parts for batch in part.batches())
    twins = _twins(parts, params.near_duplicate_bits)
    names = _keys_of(parts, np.unique(np.concatenate([found.others for found in twins.values()])))
    first = 0
    for part in parts:
        last = first + len(part)
        yield _metadata(part, rated, params).assign(
            **{name: found.named(first, last, names) for name, found in twins.items()}
        )
        first = last


def _metadata(part: SpooledTable, rated: bool, params: ValidateParams) -> pd.DataFrame:
    """Return rows sorted by key; a source that rates any image must rate every image."""
    table = part.read()
    frame = table.drop_columns(["captions"]).to_pandas()
    sides = frame[["width", "height"]]
    frame = frame.drop(columns=sides.columns)  # Great Expectations hashes every column
    frame["shorter_side"] = sides.min(axis=1)
    frame["aspect_ratio"] = sides.max(axis=1) / frame["shorter_side"]
    for name, values in _captions(table["captions"], params).items():
        frame[name] = values
    if rated:
        frame["safety"] = frame["safety"].fillna("unknown")
    return frame


@dataclass(frozen=True)
class Twins:
    """The rows that repeat another one, ascending, and which: int64 [n] each."""

    rows: Rows
    others: Rows

    def named(self, first: int, last: int, names: Mapping[int, str]) -> NDArray[np.object_]:
        """Return the key of the other for each row from `first` up to `last`, None for those that repeat none."""
        named = np.full(last - first, None, object)
        start, stop = np.searchsorted(self.rows, [first, last])
        named[self.rows[start:stop] - first] = [names[other] for other in self.others[start:stop].tolist()]
        return named


def _keys_of(parts: Sequence[SpooledTable], rows: Rows) -> dict[int, str]:
    """Return row -> key of some rows, which ascend."""
    found: dict[int, str] = {}
    first = 0
    for batch in (batch for part in parts for batch in part.batches()):
        start, stop = np.searchsorted(rows, [first, first + len(batch)])
        own = rows[start:stop]
        found.update(zip(own.tolist(), batch.column("key").take(pa.array(own - first)).to_pylist(), strict=True))
        first += len(batch)
    return found


def _twins(parts: Sequence[SpooledTable], bits: int) -> dict[str, Twins]:
    """For each row the first exact or near duplicate in the same or in the training split.

    A near duplicate is not the same file. Of a pair across splits, the held-out image is reported.
    """
    splits = _splits(parts)
    repeated = {"repeats": np.zeros(len(splits), np.bool_), "leaks": np.zeros(len(splits), np.bool_)}
    same = _found(duplicates.Neighbours(_codes(parts), 0), splits, repeated)
    for name, found in same.items():
        repeated[name][found.rows] = True
    hashes = _perceptual(parts)
    if hashes is None:
        nothing = Twins(np.empty(0, np.int64), np.empty(0, np.int64))
        return same | {f"nearly_{name}": nothing for name in same}
    near = _found(duplicates.Neighbours(hashes, bits), splits, repeated)
    return same | {f"nearly_{name}": found for name, found in near.items()}


def _found(
    neighbours: duplicates.Neighbours, splits: NDArray[np.uint8], left_out: Mapping[str, NDArray[np.bool_]]
) -> dict[str, Twins]:
    """Return the duplicates within each split, and those of held-out images in the training split."""
    found: dict[str, list[tuple[Rows, Rows]]] = {name: [] for name in left_out}
    for split in progress(np.unique(splits).tolist(), desc="compare", unit="split", delay=2):
        rows = (splits == split) & ~left_out["repeats"]
        found["repeats"].append(neighbours.first(rows, rows))
        if split != TRAIN:
            rows = (splits == split) & ~left_out["leaks"]
            found["leaks"].append(neighbours.first(rows, splits == TRAIN))
    return {name: _joined(each) for name, each in found.items()}


def _joined(found: Sequence[tuple[Rows, Rows]]) -> Twins:
    empty = np.empty(0, np.int64)
    rows, others = (np.concatenate(side) for side in zip((empty, empty), *found, strict=True))
    order = np.argsort(rows)
    return Twins(rows[order], others[order])


def _batches(parts: Sequence[SpooledTable], name: str) -> Iterator[pa.Array]:
    """Yield a column of all rows in order, some rows at a time."""
    return (batch.column(name) for part in parts for batch in part.batches())


def _numbers(
    parts: Sequence[SpooledTable], name: str, convert: Callable[[pa.Array], NDArray[Number]], kind: type[Number]
) -> NDArray[Number]:
    """Convert a column of all rows to numbers, [N]."""
    numbers, start = np.empty(sum(map(len, parts)), kind), 0
    for column in _batches(parts, name):
        numbers[start : start + len(column)] = convert(column)
        start += len(column)
    return numbers


def _splits(parts: Sequence[SpooledTable]) -> NDArray[np.uint8]:
    """Return a number for the split of each row, uint8 [N]: `TRAIN`, or others in the order of their names."""
    names = sorted({name for column in _batches(parts, "split") for name in column.unique().to_pylist()} - {"train"})
    known = pa.array(["train", *names[: np.iinfo(np.uint8).max]])
    return _numbers(
        parts,
        "split",
        lambda column: pc.index_in(column, known).fill_null(len(known) - 1).to_numpy().astype(np.uint8),
        np.uint8,
    )


def _codes(parts: Sequence[SpooledTable]) -> NDArray[np.uint64]:
    """Return a number for each file, uint64 [N]; files with the same SHA-256 have the same."""
    return _numbers(parts, "sha256", lambda column: digests(column.to_pylist()).view(np.uint64)[::2], np.uint64)


def _perceptual(parts: Sequence[SpooledTable]) -> NDArray[np.uint64] | None:
    """Return the perceptual hashes, uint64 [N], or None if one is damaged."""
    if not all(pc.all(pc.match_substring_regex(column, HASH)).as_py() for column in _batches(parts, "phash")):
        return None
    return _numbers(parts, "phash", lambda column: duplicates.to_numbers(column.to_pylist()), np.uint64)


def _captions(captions: pa.ChunkedArray, params: ValidateParams) -> dict[str, Rows]:
    """Statistics of the captions of each row.

    The number of captions, the length of the longest, how many are in unexpected scripts, how many hold control codes.
    """
    reader = Reader(params.caption_scripts)
    parts: list[dict[str, Rows]] = []
    for chunk in progress(captions.chunks, desc="captions", unit="chunk", delay=2):
        counts = pc.list_value_length(chunk).to_numpy()
        owners, texts = np.repeat(np.arange(len(chunk)), counts), chunk.flatten()
        longest = np.zeros(len(chunk), np.int64)
        np.maximum.at(longest, owners, pc.utf8_length(texts).to_numpy())
        foreign, control = reader.read(texts)
        parts.append(
            {
                "caption_count": counts,
                "longest_caption": longest,
                "foreign_captions": np.bincount(owners[foreign], minlength=len(chunk)),
                "control_captions": np.bincount(owners[control], minlength=len(chunk)),
            }
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _inputs(images: Path, counts: Sequence[int], quarantine: Path) -> Iterator[pd.DataFrame]:
    """Yield one row per image and per quarantined input, with the reason; the last part has the quarantined ones.

    Images are in the order of the shards, and `counts` are those of each part. Files that are known not to be images
    are left out.
    """
    refused = pq.read_table(quarantine / QUARANTINE_FILE, columns=["key", "reason", "detail"]).to_pandas()
    refused = refused[refused["reason"] != NO_IMAGE_FILE]
    tables, read = iter_columns(images, ["key"]), schema().empty_table().select(["key"])
    for number, count in enumerate(counts, 1):
        while len(read) < count:
            read = pa.concat_tables([read, next(tables)])
        yield _inputs_of(read.slice(0, count), refused if number == len(counts) else refused.iloc[:0])
        read = read.slice(count)


def _inputs_of(keys: pa.Table, refused: pd.DataFrame) -> pd.DataFrame:
    table = pd.concat([keys.to_pandas(), refused], ignore_index=True)
    table["captions_not_read"] = table["detail"].where(table["reason"] == CAPTIONS_NOT_READ, None)
    return table


def _classes(counts: dict[str, int]) -> pd.DataFrame:
    """One row per class: name as `key`, and number of images."""
    return pd.DataFrame({"key": list(counts), "images": list(counts.values())})


def _baseline(path: Path) -> Baseline:
    """Read an earlier data/accepted.json. Raises `StageError` if it cannot be read."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        return Baseline(before.get("source"), {name: int(n) for name, n in before.get("labels", {}).items()})
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise StageError(
            f"validate.baseline {path} cannot be read ({error}); give a copy of an earlier data/accepted.json, or {{}}"
        ) from None


def _balance(counts: dict[str, int], before: dict[str, int]) -> pd.DataFrame:
    """One row per class of either version: share now and before, and half of the absolute difference."""
    names = list(dict.fromkeys([*before, *counts]))
    now = pd.Series([counts.get(name, 0) for name in names]) / max(1, sum(counts.values()))
    then = pd.Series([before.get(name, 0) for name in names]) / max(1, sum(before.values()))
    return pd.DataFrame({"key": names, "share": now, "share_before": then, "moved": (now - then).abs() / 2})
