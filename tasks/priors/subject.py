"""The pictures of the subject of DreamBooth, among the training images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tasks.pictures import decoding
from tasks.pictures.images import read_columns
from tasks.pictures.index import class_index
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from tasks.formats.codec_info import CodecInfo

FEW, MANY = 3, 100
"""Fewer pictures are learned with their background, more are a data set; DreamBooth has 3 to 5, as a rule."""


def read_pictures(images: Path, name: str | None, codec: CodecInfo) -> np.ndarray:
    """Return the training images of the class `name`, or all with None, as uint8 [n, C, S, S], sorted by key.

    Prints a warning for a number that DreamBooth does not suit.

    Raises:
        StageError: if there are none.
    """
    label = None if name is None else class_index(images, name, "prior.subject")
    rows = read_columns(images, ["key", "split", "label"]).to_pylist()
    wanted = {row["key"] for row in rows if row["split"] == "train" and (label is None or row["label"] == label)}
    if not wanted:
        where = f"class '{name}' (prior.subject)" if name else "data set"
        raise StageError(f"the {where} has no training image; put 4 to 8 pictures of the subject into a folder 'train'")
    if warning := unsuited(len(wanted)):
        print(f"prior: warning: {warning}", flush=True)
    table = read_columns(images, ["key", "image", "width", "height"])
    found = sorted((row for row in table.to_pylist() if row["key"] in wanted), key=lambda row: str(row["key"]))
    side = codec.size, codec.size
    return np.stack(
        [decoding.decode_resized(row["image"], row["width"] * row["height"], side, codec.channels) for row in found]
    )


def unsuited(count: int) -> str:
    """Return what to expect of `count` pictures of a subject; empty if the number is usual."""
    if count < FEW:
        shown = "1 picture" if count == 1 else f"{count} pictures"
        return f"{shown} of the subject show too little of it beside the background; add some, 4 to 8 in all"
    if count > MANY:
        return (
            f"{count:,} pictures are a data set rather than a subject, and are trained as one subject all the same; "
            "choose 4 to 8 of them, or set prior.instance_prompt to null to train on their captions"
        )
    return ""
