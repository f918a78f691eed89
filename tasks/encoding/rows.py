"""The images that `encode` works on: their bucket, label and captions, and the disk space that their inputs take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.formats import buckets
from tasks.pictures.images import read_columns
from tasks.pictures.index import class_index
from tasks.runtime.disk import require_space

if TYPE_CHECKING:
    from tasks.formats.buckets import Resolution
    from tasks.formats.codec_info import CodecInfo
    from tasks.params import EncodeParams

BFLOAT16_BYTES = 2


@dataclass(frozen=True)
class Row:
    """An image without its pixels."""

    key: str
    sha256: str
    bucket: int
    label: int
    """-1 without a label."""
    captions: list[str]
    width: int
    height: int


def read_rows(images: Path, resolutions: Sequence[Resolution], leave_out: Sequence[str] = ()) -> dict[str, list[Row]]:
    """Return the images of each split, sorted by bucket and key, without those of the classes `leave_out`.

    Raises:
        StageError: if a class does not exist.
    """
    hidden = {class_index(images, name, "encode.leave_out") for name in leave_out}
    columns = ["key", "split", "sha256", "label", "captions", "height", "width"]
    splits: dict[str, list[Row]] = {}
    for image in read_columns(images, columns).to_pylist():
        if image["label"] is not None and image["label"] in hidden:
            continue
        row = Row(
            key=image["key"],
            sha256=image["sha256"],
            bucket=buckets.nearest_bucket(image["height"], image["width"], resolutions),
            label=-1 if image["label"] is None else image["label"],
            captions=image["captions"],
            width=image["width"],
            height=image["height"],
        )
        splits.setdefault(image["split"], []).append(row)
    return {split: sorted(rows, key=lambda row: (row.bucket, row.key)) for split, rows in sorted(splits.items())}


def input_resolution(resolution: Resolution, codec: CodecInfo) -> Resolution:
    """Convert the resolution of an image to that of the model's input."""
    downscale = codec.size // codec.autoencoder.size if codec.autoencoder else 1
    return resolution[0] // downscale, resolution[1] // downscale


def require_disk_space(
    folder: Path,
    codec: CodecInfo,
    params: EncodeParams,
    resolutions: Sequence[Resolution],
    splits: dict[str, list[Row]],
) -> None:
    """Print the disk space per 100,000 images, and the number of images per bucket, before anything is encoded.

    Raises:
        StageError: if the inputs do not fit on the disk of `folder`.
    """
    rows = [row for split in splits.values() for row in split]
    counts = [sum(row.bucket == bucket for row in rows) for bucket in range(len(resolutions))]
    sides = [input_resolution(resolution, codec) for resolution in resolutions]
    area = sum(height * width * count for (height, width), count in zip(sides, counts, strict=True))
    latent, text = codec.autoencoder, codec.text
    bytes_per_cell = codec.channels
    if latent:
        bytes_per_cell = 2 * (1 + params.horizontal_flip) * latent.channels * BFLOAT16_BYTES
    captions = len({caption for row in rows for caption in row.captions}) if text else 0
    bytes_per_caption = (text.length + bool(text.pooled)) * text.width * BFLOAT16_BYTES if text else 0
    line = f"encode: 100,000 images take {bytes_per_cell * area / max(1, len(rows)) / 10:,.1f} MB"
    if text:
        line += f", 100,000 different captions {bytes_per_caption / 10:,.1f} MB"
    cached = bytes_per_cell * area * (latent is not None) + bytes_per_caption * captions
    print(line + (", and as much in the scratch folder" if cached else ""), flush=True)
    if len(resolutions) > 1:
        listed = (f"{width}x{height} {count}" for (height, width), count in zip(resolutions, counts, strict=True))
        print(f"encode: images by bucket: {', '.join(listed)}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, bytes_per_cell * area + bytes_per_caption * captions + cached)
