"""The gates of `validate` for each table: what is expected of the data, and what to do if it fails."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.pictures import decoding
from tasks.validation.report.findings import Gate

if TYPE_CHECKING:
    import pandas as pd

    from tasks.params import ValidateParams
    from tasks.pictures.index import ImageIndex

SPLITS = ["train", "test", "val"]
NAMED_CLASSES = 3
"""Number of classes that the message of a changed label balance names."""


def column_gates() -> list[Gate]:
    """Gates for the table of columns."""
    return [
        Gate(
            "schema",
            "ExpectColumnPairValuesToBeEqual",
            {"column_A": "found", "column_B": "expected"},
            "columns of the shards are not those of the dataset format; run 'dvc repro -f ingest'",
        )
    ]


@dataclass(frozen=True)
class Extremes:
    """What the gates say about all images."""

    shorter_side: int
    """The smallest of all images."""
    aspect_ratio: float
    """The largest of all images."""


def row_gates(index: ImageIndex, extremes: Extremes, params: ValidateParams) -> list[Gate]:
    """Gates for the table of images."""
    return [
        *_picture_gates(index, extremes, params),
        *_origin_gates(),
        *_twin_gates(params),
        *(_caption_gates(params) if index.caption_count else ()),
        *(_label_gates(index.classes) if index.classes else ()),
    ]


def _picture_gates(index: ImageIndex, extremes: Extremes, params: ValidateParams) -> list[Gate]:
    between, one_of = "ExpectColumnValuesToBeBetween", "ExpectColumnValuesToBeInSet"
    matches, damaged = "ExpectColumnValuesToMatchRegex", "hashes are damaged; run 'dvc repro -f ingest'"
    return [
        Gate(
            "rows",
            "ExpectTableRowCountToBeBetween",
            {"min_value": max(1, params.min_images)},
            f"{index.rows} images are fewer than validate.min_images {params.min_images}; add some or lower it",
        ),
        Gate("keys", "ExpectColumnValuesToBeUnique", {"column": "key"}, "keys repeat; run 'dvc repro -f ingest'"),
        Gate(
            "size",
            between,
            {"column": "shorter_side", "min_value": params.min_side},
            f"images are smaller than validate.min_side {params.min_side}; remove them, or set it to "
            f"{extremes.shorter_side} to enlarge all of them",
        ),
        Gate(
            "aspect",
            between,
            {"column": "aspect_ratio", "max_value": params.max_aspect_ratio},
            f"images are longer than validate.max_aspect_ratio {params.max_aspect_ratio}; crop or remove them, or set "
            f"it to {math.ceil(extremes.aspect_ratio)} to train on their centre",
        ),
        Gate("mode", one_of, {"column": "mode", "value_set": list(decoding.MODES)}, "modes are unknown; convert them"),
        Gate("splits", one_of, {"column": "split", "value_set": SPLITS}, "splits are unknown; use train, test and val"),
        Gate(
            "splits",
            "ExpectColumnDistinctValuesToContainSet",
            {"column": "split", "value_set": ["train", "test"]},
            f"a split is empty (images per split: {index.splits}); add images, or change ingest.held_out_fraction",
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
            "no licence is recorded; set download.licence ('unknown' is allowed)",
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
            "images are not rated safe, in a source that rates images; remove them from the source",
        ),
    ]


def _twin_gates(params: ValidateParams) -> list[Gate]:
    def gate(check: str, column: str, complaint: str) -> Gate:
        limit = params.max_duplicate_fraction
        return Gate(
            check,
            "ExpectColumnValuesToBeNull",
            {"column": column, "mostly": 1 - limit},
            f"more than validate.max_duplicate_fraction {limit} of the images {complaint}",
        )

    near = f"(perceptual hashes within validate.near_duplicate_bits {params.near_duplicate_bits})"
    return [
        gate("duplicates", "repeats", "repeat another image of their split; remove them or raise it"),
        gate("leaks", "leaks", "are held out and in the training split; remove one of each pair or raise it"),
        gate("near_duplicates", "nearly_repeats", f"nearly repeat another image of their split {near}"),
        gate("near_leaks", "nearly_leaks", f"are held out, and a near duplicate is in the training split {near}"),
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
            "images have no caption, but others do; add captions or remove the images",
        ),
        Gate(
            "caption_characters",
            between,
            {"column": "control_captions", "max_value": 0},
            "captions contain control characters; run 'dvc repro -f ingest', which quarantines them",
        ),
        Gate(
            "caption_script",
            between,
            {"column": "foreign_captions", "max_value": 0},
            f"captions are mostly in other scripts than validate.caption_scripts {', '.join(params.caption_scripts)}; "
            "add the scripts or remove the captions",
        ),
    ]


def _label_gates(classes: list[str]) -> list[Gate]:
    return [
        Gate(
            "unlabelled",
            "ExpectColumnValuesToNotBeNull",
            {"column": "label"},
            "images lie in no class folder (folders named train, test or val are splits); move them, or train without "
            "labels (codec.conditioning none or text)",
        ),
        Gate(
            "labels",
            "ExpectColumnValuesToBeBetween",
            {"column": "label", "min_value": 0, "max_value": len(classes) - 1},
            "labels name no class; run 'dvc repro -f ingest'",
        ),
    ]


def input_gates(params: ValidateParams) -> list[Gate]:
    """Gates for the table of inputs: images and quarantined files."""
    return [
        Gate(
            "decodability",
            "ExpectColumnValuesToBeNull",
            {"column": "reason", "mostly": 1 - params.max_quarantined_fraction},
            f"more than validate.max_quarantined_fraction {params.max_quarantined_fraction} of the inputs are in "
            "quarantine; repair or remove them, or raise it",
        ),
        Gate(
            "captions_read",
            "ExpectColumnValuesToBeNull",
            {"column": "captions_not_read"},
            "files or lines look like captions and are not read; data/quarantine has the reasons",
        ),
    ]


def caption_file_gates() -> list[Gate]:
    """Gate for the table of caption files.

    Lines that name no image are not quarantined inputs (see `tasks.sources.folder`), so this gate counts them.
    """
    return [
        Gate(
            "captions_read",
            "ExpectColumnValuesToBeBetween",
            {"column": "unmatched", "max_value": 0},
            "caption files have lines that name no image; correct the names or remove the lines",
        )
    ]


def class_gates(params: ValidateParams) -> list[Gate]:
    """Gate for the table of classes."""
    return [
        Gate(
            "class_size",
            "ExpectColumnValuesToBeBetween",
            {"column": "images", "min_value": params.min_images_per_class},
            f"classes have fewer images than validate.min_images_per_class {params.min_images_per_class}; "
            "add images or lower it",
        )
    ]


def balance_gates(balance: pd.DataFrame, params: ValidateParams) -> list[Gate]:
    """Gate for the table of class shares. The sum of `moved` is the total variation distance of the distributions."""
    most = balance.sort_values("moved", ascending=False, kind="stable").head(NAMED_CLASSES)
    moved = ", ".join(f"{row.key} {row.share_before:.1%} to {row.share:.1%}" for row in most.itertuples())
    return [
        Gate(
            "drift",
            "ExpectColumnSumToBeBetween",
            {"column": "moved", "max_value": params.max_label_drift},
            f"the label balance moved by {balance['moved'].sum():.1%} since {params.baseline}, over "
            f"validate.max_label_drift {params.max_label_drift} ({moved}); if this is intended, copy "
            "data/accepted.json there",
        )
    ]
