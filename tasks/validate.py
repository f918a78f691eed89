"""The stage `validate`: judge the images' metadata with Great Expectations, before anything is trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import atomic, decoding, expectations, stage
from tasks.expectations import Finding, Gate, Table
from tasks.images import read_columns, read_index
from tasks.params import ValidateParams
from tasks.quarantine import FILE as QUARANTINE_FILE
from tasks.quarantine import NO_IMAGE_FILE
from tasks.stage import StageError

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ["train", "test", "val"]
NAMED_OFFENDERS = 5


def validate(images: Path, quarantine: Path, accepted: Path, reports: Path, params: ValidateParams) -> None:
    """Run the suite over the images' metadata; write Data Docs, and data/accepted.json if every gate holds.

    A failed gate ends the stage, names the first offenders and writes no accepted.json, so that
    nothing after it runs.
    """
    index = read_index(images)
    print(f"validate: {index['rows']} rows, loading Great Expectations", flush=True)
    tables = [
        Table("images", _rows(images), _row_gates(index, params)),
        Table("inputs", _inputs(images, quarantine), _input_gates(params)),
    ]
    if index["classes"]:
        tables.append(Table("classes", _classes(images, index["classes"]), _class_gates(params)))
    with atomic.writing_folder(reports) as folder:
        findings = expectations.judge(tables, folder)
    failed = [finding for finding in findings if not finding.success]
    if failed:
        complaints = "; ".join(_complaint(finding) for finding in failed)
        raise StageError(f"the data is not accepted: {complaints}; {reports / 'index.html'} shows every check")
    verdict = {
        "verdict": "accepted",
        "source": index["source"],
        "sha256": index["sha256"],
        "checks": {"gates": len(findings), "tolerated": sum(finding.unexpected for finding in findings)},
    }
    atomic.write_json(accepted, verdict)
    print(f"validate: accepted, all {len(findings)} gates hold; see {reports / 'index.html'}")


def _complaint(finding: Finding) -> str:
    shown = finding.offenders[:NAMED_OFFENDERS]
    more = finding.unexpected - len(shown)
    names = f" ({', '.join(shown)}{f' and {more} more' if more > 0 else ''})" if shown else ""
    return f"{finding.gate.complaint}{names}"


def _rows(images: Path) -> pd.DataFrame:
    """One row per image: metadata, and what follows from it."""
    columns = ["key", "width", "height", "mode", "label", "captions", "split", "sha256", "phash", "licence"]
    frame = read_columns(images, columns).to_pandas().sort_values("key", ignore_index=True)
    frame["shorter_side"] = frame[["width", "height"]].min(axis=1)
    frame["aspect_ratio"] = frame[["width", "height"]].max(axis=1) / frame["shorter_side"]
    captions = frame.pop("captions")
    frame["caption_count"] = captions.map(len)
    frame["longest_caption"] = captions.map(lambda texts: max((len(text) for text in texts), default=0))
    first = frame.groupby(["sha256", "split"])["key"].transform("first")
    frame["repeats"] = first.where(first != frame["key"])
    splits = frame.groupby("sha256")["split"].transform("nunique")
    # The held-out copy is the one to complain about: its twin was trained on.
    frame["leaks"] = frame["sha256"].where((splits > 1) & (frame["split"] != "train"))
    return frame


def _row_gates(index: dict[str, Any], params: ValidateParams) -> list[Gate]:
    between = "ExpectColumnValuesToBeBetween"
    alike = 1 - params.max_duplicate_fraction
    gates = [
        Gate(
            "ExpectTableRowCountToBeBetween",
            {"min_value": max(1, params.min_images)},
            f"{index['rows']} images are fewer than validate.min_images {params.min_images}; add some or lower it",
        ),
        Gate("ExpectColumnValuesToBeUnique", {"column": "key"}, "keys are not unique; run 'dvc repro -f ingest'"),
        Gate(
            between,
            {"column": "shorter_side", "min_value": params.min_side},
            f"images are smaller than validate.min_side {params.min_side}; remove them or lower it",
        ),
        Gate(
            between,
            {"column": "aspect_ratio", "max_value": params.max_aspect_ratio},
            f"images are longer than validate.max_aspect_ratio {params.max_aspect_ratio}; crop them or raise it",
        ),
        Gate("ExpectColumnValuesToBeInSet", {"column": "mode", "value_set": list(decoding.MODES)}, "modes are unknown"),
        Gate("ExpectColumnValuesToBeInSet", {"column": "split", "value_set": SPLITS}, "splits are unknown"),
        Gate(
            "ExpectColumnDistinctValuesToContainSet",
            {"column": "split", "value_set": ["train", "test"]},
            f"a split is empty (images per split: {index['splits']}); add images, or change ingest.held_out_fraction",
        ),
        Gate("ExpectColumnValuesToMatchRegex", {"column": "sha256", "regex": "^[0-9a-f]{64}$"}, "hashes are damaged"),
        Gate("ExpectColumnValuesToMatchRegex", {"column": "phash", "regex": "^[0-9a-f]{16}$"}, "hashes are damaged"),
        Gate(
            "ExpectColumnValueLengthsToBeBetween",
            {"column": "licence", "min_value": 1},
            "no licence is recorded; write it into download.licence ('unknown' is an answer)",
        ),
        Gate(
            "ExpectColumnValuesToBeNull",
            {"column": "repeats", "mostly": alike},
            f"more than validate.max_duplicate_fraction {params.max_duplicate_fraction} of the images repeat another "
            "of their split; remove them or raise it",
        ),
        Gate(
            "ExpectColumnValuesToBeNull",
            {"column": "leaks", "mostly": alike},
            f"more than validate.max_duplicate_fraction {params.max_duplicate_fraction} of the images are held out "
            "and trained on; remove one of each pair or raise it",
        ),
    ]
    if index["caption_count"]:
        gates += [
            Gate(
                between,
                {"column": "longest_caption", "max_value": params.max_caption_characters},
                f"captions exceed validate.max_caption_characters {params.max_caption_characters}; shorten or raise it",
            ),
            Gate(between, {"column": "caption_count", "min_value": 1}, "images have no caption, while others have one"),
        ]
    if index["classes"]:
        gates += [
            Gate("ExpectColumnValuesToNotBeNull", {"column": "label"}, "images lie in no class folder; move them"),
            Gate(
                between,
                {"column": "label", "min_value": 0, "max_value": len(index["classes"]) - 1},
                "labels name no class; run 'dvc repro -f ingest'",
            ),
        ]
    return gates


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
            "ExpectColumnValuesToBeNull",
            {"column": "reason", "mostly": 1 - params.max_quarantined_fraction},
            f"more than validate.max_quarantined_fraction {params.max_quarantined_fraction} of the inputs are in "
            "quarantine; repair or remove them, or raise it",
        )
    ]


def _classes(images: Path, classes: list[str]) -> pd.DataFrame:
    """One row per class: its name as `key`, and the number of its images."""
    import pandas as pd

    labels = read_columns(images, ["label"]).to_pandas()["label"]
    counts = labels.value_counts().reindex(range(len(classes)), fill_value=0)
    return pd.DataFrame({"key": classes, "images": counts.to_numpy()})


def _class_gates(params: ValidateParams) -> list[Gate]:
    return [
        Gate(
            "ExpectColumnValuesToBeBetween",
            {"column": "images", "min_value": params.min_images_per_class},
            f"classes have fewer images than validate.min_images_per_class {params.min_images_per_class}; "
            "add images or lower it",
        )
    ]


if __name__ == "__main__":
    stage.main(validate)
