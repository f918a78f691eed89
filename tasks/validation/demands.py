"""Gates for the demands of codec, judge, training and evaluation, so that `validate` reports them before these run.

Their check cannot be listed in `validate.warn_only`, because a later stage would fail.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from tasks.params import IMAGES_PER_DIMENSION, Demands
from tasks.pictures.images import iter_columns
from tasks.validation.expectations import Table
from tasks.validation.report.findings import Gate

if TYPE_CHECKING:
    from tasks.pictures.index import ImageIndex

CHECK = "demands"
FEWEST = 2
"""Least number of images of each split for training and testing a judge."""


def tables(images: Path, index: ImageIndex, demands: Demands) -> list[Table]:
    """Tables about the dataset as a whole and about its classes."""
    facts = {"training_images": index.splits.get("train", 0), "held_out_images": index.splits.get("test", 0)}
    facts["classes"] = len(index.classes)
    whole = pd.DataFrame([{"key": "the data set", **facts}])
    found = [Table("demands", whole, _gates(facts, demands))]
    if index.classes and demands.conditioning != "none":
        found.append(Table("trained_classes", _trained(images, index.classes), [_trained_gate()]))
    return found


def row_gates(index: ImageIndex, demands: Demands, others: list[Gate]) -> list[Gate]:
    """Add gates for the labels or captions of each image to `others`; they replace equal expectations there."""
    gates = []
    if demands.conditioning == "label" and index.classes:
        gates.append(
            Gate(
                CHECK,
                "ExpectColumnValuesToNotBeNull",
                {"column": "label"},
                "images lie in no class folder, and codec.conditioning is 'label'; move them, or set it to 'none'",
            )
        )
    if demands.conditioning == "text":
        gates.append(
            Gate(
                CHECK,
                "ExpectColumnValuesToBeBetween",
                {"column": "caption_count", "min_value": 1},
                "images have no caption, and codec.conditioning is 'text'; add captions, set ingest.caption_templates, "
                "or set it to 'label' or 'none'",
            )
        )
    expected = [(gate.type, gate.arguments) for gate in gates]
    return [gate for gate in others if (gate.type, gate.arguments) not in expected] + gates


def _gates(facts: dict[str, int], demands: Demands) -> list[Gate]:
    train, held_out, needed = facts["training_images"], facts["held_out_images"], demands.images_for_distances
    gates = [
        _at_least(
            "training_images",
            max(FEWEST, demands.batch_size),
            f"{train} training images are fewer than train.batch_size {demands.batch_size}; lower it to {train} or less"
            if train >= FEWEST
            else f"there are {train} training images, and measuring needs {FEWEST}; add images or change "
            "ingest.held_out_fraction",
        ),
        _at_least(
            "held_out_images",
            max(FEWEST, needed),
            f"{held_out} held-out images are too few for distances in features of {needed // IMAGES_PER_DIMENSION} "
            f"dimensions, which need {needed}; add images, raise ingest.held_out_fraction, or set "
            "evaluate.allow_small_n to true"
            if needed > FEWEST
            else f"there are {held_out} held-out images, and measuring needs {FEWEST}; add images or raise "
            "ingest.held_out_fraction",
        ),
    ]
    if demands.conditioning == "label":
        gates.append(
            _at_least(
                "classes",
                1,
                "the images have no classes, and codec.conditioning is 'label'; set it to 'none', or sort the images "
                "into one folder per class",
            )
        )
    return gates


def _at_least(column: str, least: int, complaint: str) -> Gate:
    return Gate(CHECK, "ExpectColumnValuesToBeBetween", {"column": column, "min_value": least}, complaint)


def _trained(images: Path, classes: list[str]) -> pd.DataFrame:
    """One row per class: name as `key`, and number of training images."""
    counts = np.zeros(len(classes), np.int64)
    for table in iter_columns(images, ["label", "split"]):
        labels = table.filter(pc.equal(table["split"], "train"))["label"].drop_null().to_numpy()
        counts += np.bincount(labels[(labels >= 0) & (labels < len(classes))], minlength=len(classes))
    return pd.DataFrame({"key": classes, "images": counts})


def _trained_gate() -> Gate:
    return _at_least(
        "images",
        1,
        "classes have no training image; move some of their images to the training split, or lower "
        "ingest.held_out_fraction",
    )
