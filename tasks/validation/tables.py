"""The tables that `validate` checks, built from the columns of the shards, with their gates."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tasks.formats.quarantine import FILE as QUARANTINE_FILE
from tasks.pictures import colours
from tasks.pictures.images import enlarged, read_columns, schema, schema_of
from tasks.pictures.index import read_index
from tasks.runtime.errors import StageError
from tasks.runtime.progress import progress
from tasks.sources.entry import CAPTIONS_NOT_READ, NO_IMAGE_FILE
from tasks.validation import checks, demands, duplicates
from tasks.validation.expectations import Table
from tasks.validation.writing_systems import Reader

if TYPE_CHECKING:
    from tasks.params import Demands, ValidateParams
    from tasks.pictures.index import ImageIndex

Rows: TypeAlias = NDArray[np.int64]
PART_ROWS = 500_000
"""Images that are judged at a time."""


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
    parts = _parts(images, index)
    extremes, small = _extremes(images, asked.resolution)
    notes = {"size": enlarged(small, asked.resolution), "mode": "; ".join(colours.sentences(index.profiles))}
    gates = demands.row_gates(index, asked, checks.row_gates(index, extremes, params))
    gates = [replace(gate, note=notes.get(gate.check, "")) for gate in gates]
    numbers: Iterable[int | None] = [None] if len(parts) == 1 else range(1, len(parts) + 1)
    for number, rows in zip(numbers, _rows(images, parts, params), strict=True):
        yield Table("images", rows, gates, number)
    for number, inputs in zip(numbers, _inputs(images, parts, quarantine), strict=True):
        yield Table("inputs", inputs, checks.input_gates(params), number)
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
    values = pc.value_counts(read_columns(images, ["label"])["label"]).to_pylist()
    found = {value["values"]: value["counts"] for value in values}
    return {name: found.get(label, 0) for label, name in enumerate(classes)}


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


def _parts(images: Path, index: ImageIndex) -> list[list[Path]]:
    """Divide the shards into parts of at most `PART_ROWS` rows, or of one shard; a key is in one shard only."""
    parts: list[list[Path]] = [[]]
    rows = 0
    for shard in index.shards:
        count = pq.read_metadata(images / shard).num_rows
        if parts[-1] and rows + count > PART_ROWS:
            parts.append([])
            rows = 0
        parts[-1].append(images / shard)
        rows += count
    return parts


def _extremes(images: Path, resolution: int) -> tuple[checks.Extremes, int]:
    """Return the extremes of all images, and how many are smaller than `resolution`."""
    sides = np.stack([read_columns(images, [name])[name].to_numpy() for name in ("width", "height")])
    shorter = sides.min(axis=0)
    if not len(shorter):
        return checks.Extremes(0, 1.0), 0
    extremes = checks.Extremes(int(shorter.min()), float((sides.max(axis=0) / shorter).max()))
    return extremes, int((shorter < resolution).sum())


def _rows(images: Path, parts: Sequence[Sequence[Path]], params: ValidateParams) -> Iterator[pd.DataFrame]:
    """Yield one row per image, part by part: metadata and derived columns."""
    rated = read_columns(images, ["safety"])["safety"].null_count < read_index(images).rows
    first, twins, names = 0, None, dict[int, str]()
    if len(parts) > 1:
        twins = _twins(*_all_hashes_of(images, parts), params.near_duplicate_bits)
        names = _keys_of(images, parts, np.unique(np.concatenate(list(twins.values()))))
    for part in parts:
        frame = _metadata(images, part, rated, params)
        last = first + len(frame)
        if twins is None:
            keys = frame["key"].to_numpy()
            own = _twins(*_hashes(frame["sha256"], frame["phash"], frame["split"]), params.near_duplicate_bits)
            shown = {name: _taken(keys, rows) for name, rows in own.items()}
        else:
            shown = {name: _named(rows[first:last], names) for name, rows in twins.items()}
        first = last
        yield frame.assign(**shown)


def _taken(keys: NDArray[np.object_], rows: Rows) -> NDArray[np.object_]:
    """Return the keys of rows, None for negative ones."""
    taken = keys[rows].astype(object)
    taken[rows < 0] = None
    return taken


def _named(rows: Rows, names: Mapping[int, str]) -> NDArray[np.object_]:
    """Return the keys of rows, None for those that have none."""
    return np.array([names.get(row) for row in rows.tolist()], object)


def _metadata(images: Path, part: Collection[Path], rated: bool, params: ValidateParams) -> pd.DataFrame:
    """Return the rows of some shards, sorted by key; a source that rates any image must rate every image."""
    columns = ["width", "height", "mode", "label", "split", "sha256", "phash", "licence", "source", "safety"]
    table = read_columns(images, ["key", *columns, "captions"], part).sort_by("key")
    frame = table.select(["key", *columns]).to_pandas()
    sides = frame[["width", "height"]]
    frame = frame.drop(columns=sides.columns)  # Great Expectations hashes every column
    frame["shorter_side"] = sides.min(axis=1)
    frame["aspect_ratio"] = sides.max(axis=1) / frame["shorter_side"]
    for name, values in _captions(table["captions"], params).items():
        frame[name] = values
    if rated:
        frame["safety"] = frame["safety"].fillna("unknown")
    return frame


Hashes: TypeAlias = "tuple[NDArray[np.uint64], NDArray[np.uint64] | None, NDArray[np.str_]]"
"""A number for each file, uint64 [N]; perceptual hashes, uint64 [N], or None if one is damaged; splits [N]."""


def _hashes(files: pd.Series, perceptual: pd.Series, splits: pd.Series) -> Hashes:
    numbers = duplicates.to_numbers(perceptual.tolist()) if _all_hashes(perceptual) else None
    return files.factorize()[0].astype(np.uint64), numbers, splits.to_numpy(str)


def _all_hashes_of(images: Path, parts: Sequence[Sequence[Path]]) -> Hashes:
    """Return the hashes of all rows, in the order of the parts.

    Files count as equal if their SHA-256 begin with the same 64 bits.
    """
    files, perceptual, splits = [], [], []
    for part in parts:
        frame = read_columns(images, ["key", "sha256", "phash", "split"], part).sort_by("key").to_pandas()
        starts = frame["sha256"].str.slice(0, 16)
        files.append(duplicates.to_numbers(starts.tolist()) if _all_hashes(starts) else None)
        perceptual.append(duplicates.to_numbers(frame["phash"].tolist()) if _all_hashes(frame["phash"]) else None)
        splits.append(frame["split"].to_numpy("U5"))
    count = sum(map(len, splits))
    known = [numbers for numbers in files if numbers is not None]
    # With damaged hashes, which fail a gate of their own, no files are equal.
    codes = np.concatenate(known) if len(known) == len(files) else np.arange(count, dtype=np.uint64)
    seen = [numbers for numbers in perceptual if numbers is not None]
    return codes, np.concatenate(seen) if len(seen) == len(perceptual) else None, np.concatenate(splits)


def _keys_of(images: Path, parts: Sequence[Sequence[Path]], rows: Rows) -> dict[int, str]:
    """Return row -> key of some rows, numbered in the order of the parts; negative ones have none."""
    found: dict[int, str] = {}
    first = 0
    for part in parts:
        keys = read_columns(images, ["key"], part).sort_by("key")["key"]
        own = rows[(rows >= first) & (rows < first + len(keys))]
        found.update(zip(own.tolist(), keys.take(own - first).to_pylist(), strict=True))
        first += len(keys)
    return found


def _twins(
    codes: NDArray[np.uint64], hashes: NDArray[np.uint64] | None, splits: NDArray[np.str_], bits: int
) -> dict[str, Rows]:
    """For each row the first exact or near duplicate in the same or in the training split: int64 [N], -1 for none.

    A near duplicate is not the same file. Of a pair across splits, the held-out image is reported.
    """
    found = {name: np.full(len(codes), -1) for name in ("repeats", "leaks", "nearly_repeats", "nearly_leaks")}
    train = np.flatnonzero(splits == "train")
    for split in progress(np.unique(splits), desc="compare", unit="split", delay=2):
        rows = np.flatnonzero(splits == split)
        found["repeats"][rows] = duplicates.first_duplicates(codes, rows, rows, 0)
        others = np.flatnonzero((splits == split) & (found["repeats"] < 0))
        if hashes is not None:
            found["nearly_repeats"][others] = duplicates.first_duplicates(hashes, others, others, bits)
        if split != "train":
            found["leaks"][rows] = duplicates.first_duplicates(codes, rows, train, 0)
            others = np.flatnonzero((splits == split) & (found["leaks"] < 0))
            if hashes is not None:
                found["nearly_leaks"][others] = duplicates.first_duplicates(hashes, others, train, bits)
    return found


def _all_hashes(hashes: pd.Series) -> bool:
    return bool(hashes.str.fullmatch("[0-9a-f]{16}").all())


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


def _inputs(images: Path, parts: Sequence[Sequence[Path]], quarantine: Path) -> Iterator[pd.DataFrame]:
    """Yield one row per image and per quarantined input, with the reason; the last part has the quarantined ones.

    Files that are known not to be images are left out.
    """
    refused = pq.read_table(quarantine / QUARANTINE_FILE, columns=["key", "reason", "detail"]).to_pandas()
    refused = refused[refused["reason"] != NO_IMAGE_FILE]
    for number, part in enumerate(parts, 1):
        rows = read_columns(images, ["key"], part).to_pandas()
        table = pd.concat([rows, refused if number == len(parts) else refused.iloc[:0]], ignore_index=True)
        table["captions_not_read"] = table["detail"].where(table["reason"] == CAPTIONS_NOT_READ, None)
        yield table


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
