"""The tables that `validate` checks, built from the columns of the shards, with their gates."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
    rows = _rows(images, params)
    notes = {
        "size": enlarged(int((rows["shorter_side"] < asked.resolution).sum()), asked.resolution),
        "mode": "; ".join(colours.sentences(index.profiles)),
    }
    gates = demands.row_gates(index, asked, checks.row_gates(index, rows, params))
    yield Table("images", rows, [replace(gate, note=notes.get(gate.check, "")) for gate in gates])
    yield Table("inputs", _inputs(images, quarantine), checks.input_gates(params))
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


def _rows(images: Path, params: ValidateParams) -> pd.DataFrame:
    """One row per image: metadata and derived columns."""
    columns = ["width", "height", "mode", "label", "split", "sha256", "phash", "licence", "source", "safety"]
    table = read_columns(images, ["key", *columns, "captions"]).sort_by("key")
    frame = table.select(["key", *columns]).to_pandas()
    sides = frame[["width", "height"]]
    frame = frame.drop(columns=sides.columns)  # Great Expectations hashes every column
    frame["shorter_side"] = sides.min(axis=1)
    frame["aspect_ratio"] = sides.max(axis=1) / frame["shorter_side"]
    for name, values in _captions(table["captions"], params).items():
        frame[name] = values
    if frame["safety"].notna().any():  # a source that rates any image must rate every image
        frame["safety"] = frame["safety"].fillna("unknown")
    keys, twins = frame["key"].to_numpy(), _twins(frame, params.near_duplicate_bits)
    for name, rows in twins.items():
        frame[name] = np.where(rows >= 0, keys[rows], None)
    return frame


def _twins(frame: pd.DataFrame, bits: int) -> dict[str, Rows]:
    """For each row the first exact or near duplicate in the same or in the training split: int64 [N], -1 for none.

    A near duplicate is not the same file. Of a pair across splits, the held-out image is reported.
    """
    codes = frame["sha256"].factorize()[0].astype(np.uint64)
    splits = frame["split"].to_numpy(str)
    hashes = duplicates.to_numbers(frame["phash"].tolist()) if _all_hashes(frame["phash"]) else None
    found = {name: np.full(len(frame), -1) for name in ("repeats", "leaks", "nearly_repeats", "nearly_leaks")}
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


def _inputs(images: Path, quarantine: Path) -> pd.DataFrame:
    """One row per image and per quarantined input, with the reason; without files that are known not to be images."""
    rows = read_columns(images, ["key"]).to_pandas()
    refused = pq.read_table(quarantine / QUARANTINE_FILE, columns=["key", "reason", "detail"]).to_pandas()
    table = pd.concat([rows, refused[refused["reason"] != NO_IMAGE_FILE]], ignore_index=True)
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
