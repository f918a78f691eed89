"""One split of the model's inputs: the tensors of each bucket, written as shards."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tasks.formats.latents import BucketShard, Split, keys_hash, write_shards
from tasks.pictures import decoding
from tasks.pictures.digests import Places
from tasks.pictures.images import read_encoded, unnamed_file
from tasks.runtime.progress import progress

if TYPE_CHECKING:
    import torch

    from tasks.encoding.blocks import Blocks
    from tasks.encoding.control import Controls
    from tasks.encoding.rows import Rows
    from tasks.encoding.texts import Captions
    from tasks.formats.buckets import Resolution
    from tasks.formats.codec_info import CodecInfo
    from tasks.formats.latents import Columns


@dataclass(frozen=True)
class SplitWriter:
    """Writes splits from the images (identity codec) or from their latents."""

    images: Path
    codec: CodecInfo
    resolutions: Sequence[Resolution]
    """Image resolution of each bucket."""
    latents: Blocks | None
    """None for the identity codec."""
    captions: Captions | None
    """None without text conditioning."""
    shard_size: int
    controls: Controls | None = None
    """Control maps; None without them."""

    def write(self, folder: Path, split: str, rows: Rows) -> Split:
        """Write the shards of a split to `folder`; returns its entry for the index."""
        shards: list[BucketShard] = []
        for bucket, resolution in enumerate(self.resolutions):
            in_bucket = rows.in_bucket(bucket)
            name = split if len(self.resolutions) == 1 else f"{split}-{resolution[0]}x{resolution[1]}"
            tensors = self._tensors(in_bucket, name, resolution)
            written = write_shards(folder, name, len(in_bucket), tensors, self.shard_size)
            shards += [BucketShard(file=shard.file, sha256=shard.sha256, bucket=bucket) for shard in written]
        return Split(count=len(rows), keys_sha256=keys_hash(rows.strings("key")), shards=shards)

    def _tensors(self, rows: Rows, name: str, resolution: Resolution) -> Callable[[slice], Columns]:
        """Return the function that makes the tensors of a part of `rows`, all of one bucket."""
        pixels = None if self.latents else self._pixels(rows, name, resolution)
        captions = self.captions.positions(rows) if self.captions else None

        def tensors(part: slice) -> Columns:
            selected = rows[part]
            columns: dict[str, np.ndarray | torch.Tensor] = {}
            if self.latents:
                columns |= self.latents.take([row.sha256 for row in selected])
            if pixels is not None:
                columns["pixels"] = pixels[part]
            if self.codec.conditioning == "label":
                columns["labels"] = np.array([row.label for row in selected], np.int64)
            if captions is not None:
                columns["captions"] = captions[part]
            if self.controls:
                columns |= self.controls.take(selected, resolution)
            if self.codec.text and self.codec.text.pooled:
                sizes = [size_conditioning(row.height, row.width, resolution) for row in selected]
                columns["sizes"] = np.array(sizes, np.int32)
            return columns

        return tensors

    def _pixels(self, rows: Rows, name: str, resolution: Resolution) -> PixelFile:
        """Decode the images of `rows` to uint8 [len(rows), C, *resolution], in a file."""
        pixels = PixelFile(len(rows), (self.codec.channels, *resolution))
        places = Places(rows.digests("sha256"))
        files = read_encoded(self.images, places)
        for sha256, data, count in progress(files, desc=f"read {name}", unit="img", delay=2):
            image = decoding.decode_resized(data, count, resolution, self.codec.channels)
            for row in places.rows(places.numbers([sha256])[0]).tolist():
                pixels.write(row, image)
        return pixels


class PixelFile:
    """Images of one shape in an unnamed file of the scratch folder, so that memory does not grow with their number."""

    def __init__(self, count: int, shape: Sequence[int]) -> None:
        """`shape` is [C, H, W]; raises `StageError` if the disk has no space for `count` images."""
        self._shape, self._bytes = tuple(shape), math.prod(shape)
        self._file = unnamed_file(count * self._bytes, f"the pixels of {count} images")
        weakref.finalize(self, self._file.close)

    def write(self, row: int, image: np.ndarray) -> None:
        """Write an image, uint8 [C, H, W]."""
        os.pwrite(self._file.fileno(), np.ascontiguousarray(image).data, row * self._bytes)

    def __getitem__(self, part: slice) -> np.ndarray:
        """Read consecutive images, uint8 [n, C, H, W]."""
        images = np.empty((part.stop - part.start, *self._shape), np.uint8)
        left, offset = images.reshape(-1).data, part.start * self._bytes
        while done := os.preadv(self._file.fileno(), [left], offset):  # at most 2 GB at a time
            left, offset = left[done:], offset + done
        return images


def size_conditioning(height: int, width: int, resolution: Resolution) -> tuple[int, int, int, int, int, int]:
    """Return SDXL's size and crop conditioning of an image (Podell et al. 2023, section 2.2).

    Returns:
        The original height and width, top and left of the centre crop in the image resized to cover `resolution`, and
        the height and width of the crop.
    """
    scale = max(resolution[0] / height, resolution[1] / width)
    sides = zip((height, width), resolution, strict=True)
    top, left = (round((original * scale - cropped) / 2) for original, cropped in sides)
    return height, width, top, left, *resolution
