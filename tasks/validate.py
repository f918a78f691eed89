"""The stage `validate`: judge the images' metadata with Great Expectations, before anything is trained on them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tasks.formats import decoding
from tasks.formats.images import read_columns, read_index, schema, schema_of
from tasks.params import ValidateParams
from tasks.runtime import atomic, stage
from tasks.runtime.stage import StageError
from tasks.sources.quarantine import FILE as QUARANTINE_FILE
from tasks.sources.quarantine import NO_IMAGE_FILE
from tasks.validation import duplicates, expectations
from tasks.validation.expectations import Finding, Gate, Table

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SPLITS = ["train", "test", "val"]
NAMED_OFFENDERS = 5
NAMED_CLASSES = 3


def validate(images: Path, quarantine: Path, accepted: Path, reports: Path, params: ValidateParams) -> None:
    """Run the suite over the images' metadata; write Data Docs, and data/accepted.json if every gate holds.

    A failed gate ends the stage, names the first offenders and writes no accepted.json, so that
    nothing after it runs. A failed gate of a check in `params.warn_only` is reported, and that is all.
    """
    index = read_index(images)
    print(f"validate: {index['rows']} rows, loading Great Expectations", flush=True)
    counts = _label_counts(images, index["classes"])
    with atomic.writing_folder(reports) as folder:
        findings = expectations.judge(
            list(_tables(images, quarantine, index, counts, params)), folder, params.warn_only
        )
        atomic.write_json(folder / "findings.json", [_report(finding, params) for finding in findings])
    failed = [finding for finding in findings if not finding.success]
    for finding in failed:
        if finding.gate.check in params.warn_only:
            print(f"validate: warning: {_complaint(finding)}")
    stopping = [_complaint(finding) for finding in failed if finding.gate.check not in params.warn_only]
    if stopping:
        raise StageError(f"the data is not accepted: {'; '.join(stopping)}; {reports / 'index.html'} shows every check")
    atomic.write_json(
        accepted,
        {
            "verdict": "accepted",
            "source": index["source"],
            "sha256": index["sha256"],
            "images": index["rows"],
            "labels": counts,
        },
    )
    held = f"{len(findings) - len(failed)} of {len(findings)} gates hold"
    print(f"validate: accepted, {held}, {len(failed)} warn; see {reports / 'index.html'}")


def _tables(
    images: Path, quarantine: Path, index: dict[str, Any], counts: dict[str, int], params: ValidateParams
) -> Iterator[Table]:
    columns = _columns(images, index["shards"])
    yield Table("columns", columns, _column_gates())
    if not (columns["found"] == columns["expected"]).all():
        return  # the rows of such shards cannot be read
    yield Table("images", _rows(images, params), _row_gates(index, params))
    yield Table("inputs", _inputs(images, quarantine), _input_gates(params))
    if index["classes"]:
        yield Table("classes", _classes(counts), _class_gates(params))
    before = _baseline(Path(params.baseline))
    if index["classes"] and before["labels"] and before["source"] == index["source"]:
        balance = _balance(counts, before["labels"])
        yield Table("balance", balance, _balance_gates(balance, params))


def _report(finding: Finding, params: ValidateParams) -> dict[str, Any]:
    severity = "warning" if finding.gate.check in params.warn_only else "failure"
    return {**asdict(finding), "severity": severity}


def _complaint(finding: Finding) -> str:
    shown = finding.offenders[:NAMED_OFFENDERS]
    more = finding.unexpected - len(shown)
    names = f" ({', '.join(shown)}{f' and {more} more' if more > 0 else ''})" if shown else ""
    return f"{finding.gate.complaint}{names}"


def _columns(images: Path, shards: list[str]) -> pd.DataFrame:
    """One row per column of each shard: its type as found and as expected, "missing" where there is none."""
    import pandas as pd

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
    """A column's type in words; Parquet calls the items of a list by another name than Arrow."""
    import pyarrow as pa

    return f"list of {field.type.value_type}" if pa.types.is_list(field.type) else str(field.type)


def _column_gates() -> list[Gate]:
    return [
        Gate(
            "schema",
            "ExpectColumnPairValuesToBeEqual",
            {"column_A": "found", "column_B": "expected"},
            "columns of the shards are not those of the normal form; run 'dvc repro -f ingest'",
        )
    ]


def _rows(images: Path, params: ValidateParams) -> pd.DataFrame:
    """One row per image: metadata, and what follows from it."""
    import numpy as np

    columns = ["width", "height", "mode", "label", "split", "sha256", "phash", "licence", "source", "safety"]
    table = read_columns(images, ["key", *columns, "captions"]).sort_by("key")
    frame = table.select(["key", *columns]).to_pandas()
    sides = frame[["width", "height"]]
    frame = frame.drop(columns=sides.columns)  # every column costs a hash of it in Great Expectations
    frame["shorter_side"] = sides.min(axis=1)
    frame["aspect_ratio"] = sides.max(axis=1) / frame["shorter_side"]
    for name, values in _captions(table["captions"], params).items():
        frame[name] = values
    if frame["safety"].notna().any():  # a source that judges safety judges every image
        frame["safety"] = frame["safety"].fillna("unknown")
    keys, twins = frame["key"].to_numpy(), _twins(frame, params.near_duplicate_bits)
    for name, rows in twins.items():
        frame[name] = np.where(rows >= 0, keys[rows], None)
    return frame


def _twins(frame: pd.DataFrame, bits: int) -> dict[str, Any]:
    """For each row, in several senses, the first other row that shows the same picture: int64 [N], -1 for none.

    A near twin is one that is not the same file. Of a pair across the splits the held-out one is complained
    about: its twin was trained on.
    """
    import numpy as np

    codes = frame["sha256"].factorize()[0].astype(np.uint64)
    splits = frame["split"].to_numpy(str)
    hashes = duplicates.to_numbers(frame["phash"].tolist()) if _all_hashes(frame["phash"]) else None
    found = {name: np.full(len(frame), -1) for name in ("repeats", "leaks", "nearly_repeats", "nearly_leaks")}
    train = np.flatnonzero(splits == "train")
    for split in tqdm(np.unique(splits), "compare", unit="split", mininterval=1, delay=2, dynamic_ncols=True):
        rows = np.flatnonzero(splits == split)
        found["repeats"][rows] = duplicates.resembled(codes, rows, rows, 0)
        others = np.flatnonzero((splits == split) & (found["repeats"] < 0))
        if hashes is not None:
            found["nearly_repeats"][others] = duplicates.resembled(hashes, others, others, bits)
        if split != "train":
            found["leaks"][rows] = duplicates.resembled(codes, rows, train, 0)
            others = np.flatnonzero((splits == split) & (found["leaks"] < 0))
            if hashes is not None:
                found["nearly_leaks"][others] = duplicates.resembled(hashes, others, train, bits)
    return found


def _all_hashes(hashes: pd.Series) -> bool:
    return bool(hashes.str.fullmatch("[0-9a-f]{16}").all())


def _captions(captions: pa.ChunkedArray, params: ValidateParams) -> dict[str, Any]:
    """Of each row's captions: how many, the length of the longest, whether one is in a script that is not expected,
    whether one holds control characters."""
    import numpy as np
    import pyarrow.compute as pc

    from tasks.validation.writing_systems import Reader

    reader = Reader(params.caption_scripts)
    parts: list[dict[str, Any]] = []
    for chunk in tqdm(captions.chunks, "captions", unit="chunk", mininterval=1, delay=2, dynamic_ncols=True):
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


def _row_gates(index: dict[str, Any], params: ValidateParams) -> list[Gate]:
    return [
        *_picture_gates(index, params),
        *_origin_gates(),
        *_twin_gates(params),
        *(_caption_gates(params) if index["caption_count"] else ()),
        *(_label_gates(index["classes"]) if index["classes"] else ()),
    ]


def _picture_gates(index: dict[str, Any], params: ValidateParams) -> list[Gate]:
    between, one_of = "ExpectColumnValuesToBeBetween", "ExpectColumnValuesToBeInSet"
    matches, damaged = "ExpectColumnValuesToMatchRegex", "hashes are damaged; run 'dvc repro -f ingest'"
    return [
        Gate(
            "rows",
            "ExpectTableRowCountToBeBetween",
            {"min_value": max(1, params.min_images)},
            f"{index['rows']} images are fewer than validate.min_images {params.min_images}; add some or lower it",
        ),
        Gate("keys", "ExpectColumnValuesToBeUnique", {"column": "key"}, "keys repeat; run 'dvc repro -f ingest'"),
        Gate(
            "size",
            between,
            {"column": "shorter_side", "min_value": params.min_side},
            f"images are smaller than validate.min_side {params.min_side}; remove them or lower it",
        ),
        Gate(
            "aspect",
            between,
            {"column": "aspect_ratio", "max_value": params.max_aspect_ratio},
            f"images are longer than validate.max_aspect_ratio {params.max_aspect_ratio}; crop them or raise it",
        ),
        Gate("mode", one_of, {"column": "mode", "value_set": list(decoding.MODES)}, "modes are unknown; convert them"),
        Gate("splits", one_of, {"column": "split", "value_set": SPLITS}, "splits are unknown; use train, test and val"),
        Gate(
            "splits",
            "ExpectColumnDistinctValuesToContainSet",
            {"column": "split", "value_set": ["train", "test"]},
            f"a split is empty (images per split: {index['splits']}); add images, or change ingest.held_out_fraction",
        ),
        Gate("hashes", matches, {"column": "sha256", "regex": "^[0-9a-f]{64}$"}, damaged),
        Gate("hashes", matches, {"column": "phash", "regex": "^[0-9a-f]{16}$"}, damaged),
    ]


def _origin_gates() -> list[Gate]:
    return [
        Gate(
            "licence",
            "ExpectColumnValueLengthsToBeBetween",
            {"column": "licence", "min_value": 1},
            "no licence is recorded; write it into download.licence ('unknown' is an answer)",
        ),
        Gate(
            "origin",
            "ExpectColumnValueLengthsToBeBetween",
            {"column": "source", "min_value": 1},
            "no origin is recorded; run 'dvc repro -f download'",
        ),
        Gate(
            "safety",
            "ExpectColumnValuesToBeInSet",
            {"column": "safety", "value_set": ["safe"]},
            "images are not marked safe, in a source that marks them; have it filter them out",
        ),
    ]


def _twin_gates(params: ValidateParams) -> list[Gate]:
    def gate(check: str, column: str, what: str) -> Gate:
        limit = params.max_duplicate_fraction
        return Gate(
            check,
            "ExpectColumnValuesToBeNull",
            {"column": column, "mostly": 1 - limit},
            f"more than validate.max_duplicate_fraction {limit} of the images {what}",
        )

    near = f"(perceptual hashes within validate.near_duplicate_bits {params.near_duplicate_bits})"
    return [
        gate("duplicates", "repeats", "repeat another of their split; remove them or raise it"),
        gate("leaks", "leaks", "are held out and trained on; remove one of each pair or raise it"),
        gate("near_duplicates", "nearly_repeats", f"nearly repeat another of their split {near}"),
        gate("near_leaks", "nearly_leaks", f"are held out, and nearly the same was trained on {near}"),
    ]


def _caption_gates(params: ValidateParams) -> list[Gate]:
    between = "ExpectColumnValuesToBeBetween"
    return [
        Gate(
            "caption_length",
            between,
            {"column": "longest_caption", "max_value": params.max_caption_characters},
            f"captions exceed validate.max_caption_characters {params.max_caption_characters}; shorten or raise it",
        ),
        Gate(
            "captions",
            between,
            {"column": "caption_count", "min_value": 1},
            "images have no caption, while others have one; write them or remove the images",
        ),
        Gate(
            "caption_characters",
            between,
            {"column": "control_captions", "max_value": 0},
            "captions hold control characters; run 'dvc repro -f ingest', which sets them aside",
        ),
        Gate(
            "caption_script",
            between,
            {"column": "foreign_captions", "max_value": 0},
            f"captions are mostly in other scripts than validate.caption_scripts {', '.join(params.caption_scripts)}; "
            "add theirs there or remove them",
        ),
    ]


def _label_gates(classes: list[str]) -> list[Gate]:
    return [
        Gate(
            "labels",
            "ExpectColumnValuesToNotBeNull",
            {"column": "label"},
            "images lie in no class folder; move them",
        ),
        Gate(
            "labels",
            "ExpectColumnValuesToBeBetween",
            {"column": "label", "min_value": 0, "max_value": len(classes) - 1},
            "labels name no class; run 'dvc repro -f ingest'",
        ),
    ]


def _inputs(images: Path, quarantine: Path) -> pd.DataFrame:
    """One row per input that should be an image, with the reason for which it is not one."""
    import pandas as pd
    import pyarrow.parquet as pq

    rows = read_columns(images, ["key"]).to_pandas()
    refused = pq.read_table(quarantine / QUARANTINE_FILE, columns=["key", "reason", "detail"]).to_pandas()
    return pd.concat([rows, refused[refused["reason"] != NO_IMAGE_FILE]], ignore_index=True)


def _input_gates(params: ValidateParams) -> list[Gate]:
    return [
        Gate(
            "decodability",
            "ExpectColumnValuesToBeNull",
            {"column": "reason", "mostly": 1 - params.max_quarantined_fraction},
            f"more than validate.max_quarantined_fraction {params.max_quarantined_fraction} of the inputs are in "
            "quarantine; repair or remove them, or raise it",
        )
    ]


def _label_counts(images: Path, classes: list[str]) -> dict[str, int]:
    """Number of images of each class."""
    import pyarrow.compute as pc

    found = {
        each["values"]: each["counts"] for each in pc.value_counts(read_columns(images, ["label"])["label"]).to_pylist()
    }
    return {name: found.get(label, 0) for label, name in enumerate(classes)}


def _classes(counts: dict[str, int]) -> pd.DataFrame:
    """One row per class: its name as `key`, and the number of its images."""
    import pandas as pd

    return pd.DataFrame({"key": list(counts), "images": list(counts.values())})


def _class_gates(params: ValidateParams) -> list[Gate]:
    return [
        Gate(
            "class_size",
            "ExpectColumnValuesToBeBetween",
            {"column": "images", "min_value": params.min_images_per_class},
            f"classes have fewer images than validate.min_images_per_class {params.min_images_per_class}; "
            "add images or lower it",
        )
    ]


def _baseline(path: Path) -> dict[str, Any]:
    """What was accepted before: its source, and the number of images of each class. Nothing, where it says nothing."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        return {
            "source": before.get("source"),
            "labels": {name: int(n) for name, n in before.get("labels", {}).items()},
        }
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise StageError(
            f"validate.baseline {path} cannot be read ({error}); give a copy of an earlier data/accepted.json, or {{}}"
        ) from None


def _balance(counts: dict[str, int], before: dict[str, int]) -> pd.DataFrame:
    """One row per class of either version: its share now and before, and the part of all images that moved there."""
    import pandas as pd

    names = list(dict.fromkeys([*before, *counts]))
    now = pd.Series([counts.get(name, 0) for name in names]) / max(1, sum(counts.values()))
    then = pd.Series([before.get(name, 0) for name in names]) / max(1, sum(before.values()))
    return pd.DataFrame({"key": names, "share": now, "share_before": then, "moved": (now - then).abs() / 2})


def _balance_gates(balance: pd.DataFrame, params: ValidateParams) -> list[Gate]:
    """The total variation distance between two distributions is the sum of what moved."""
    most = balance.sort_values("moved", ascending=False, kind="stable").head(NAMED_CLASSES)
    moved = ", ".join(f"{row.key} {row.share_before:.1%} to {row.share:.1%}" for row in most.itertuples())
    return [
        Gate(
            "drift",
            "ExpectColumnSumToBeBetween",
            {"column": "moved", "max_value": params.max_label_drift},
            f"the label balance moved by {balance['moved'].sum():.1%} since {params.baseline}, over "
            f"validate.max_label_drift {params.max_label_drift} ({moved}); once that is meant, copy data/accepted.json "
            "there",
        )
    ]


if __name__ == "__main__":
    stage.main(validate)
