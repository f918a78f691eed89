"""Control maps of all images: found in the scratch folder, or made in threads from images or from the user's maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from models.networks.control_maps import ControlSpec, maps_of
from tasks.encoding.blocks import Blocks
from tasks.pictures import decoding
from tasks.pictures.images import map_hashes, read_encoded, read_maps
from tasks.runtime import closure, workspace
from tasks.runtime.errors import StageError
from tasks.runtime.progress import progress

if TYPE_CHECKING:
    from tasks.encoding.rows import Row
    from tasks.formats.buckets import Resolution
    from tasks.params import EncodeParams

CHUNK = 64
"""Images per block at most."""


def spec_of(params: EncodeParams) -> ControlSpec | None:
    """Return the specification of the control maps; None without them."""
    return ControlSpec(**params.control.model_dump()) if params.control else None


@dataclass(frozen=True)
class Controls:
    """The control maps of all images, by what they are made from and their resolution."""

    blocks: Blocks
    made_from: Mapping[str, str]
    """Key of an image -> SHA-256 of the image, or of the map that the user gave for it."""

    def take(self, rows: Sequence[Row], resolution: Resolution) -> dict[str, torch.Tensor]:
        """Return the column `control` of images, uint8 [len(rows), 1 or 3, h, w]."""
        return self.blocks.take([_key(self.made_from[row.key], resolution) for row in rows])


def _key(sha256: str, resolution: Resolution) -> str:
    return f"{sha256} {resolution[0]}x{resolution[1]}"


def make_controls(
    images: Path, resolutions: Sequence[Resolution], splits: Mapping[str, Sequence[Row]], params: EncodeParams
) -> Controls | None:
    """Make the control maps that are not stored yet; returns those of all images, or None without `encode.control`.

    Raises:
        StageError: for `encode.control.kind` 'own', if an image has no map, or one that cannot be read.
    """
    spec = spec_of(params)
    if spec is None:
        return None
    recipe = {
        "control": spec.to_json(),
        "code of the control maps": closure.digest("models/networks/control_maps.py", "tasks/pictures/decoding.py"),
    }
    rows = [row for in_split in splits.values() for row in in_split]
    made_from = _own_maps(images, rows) if spec.kind == "own" else {row.key: row.sha256 for row in rows}
    blocks = Blocks(workspace.scratch() / "encode" / "controls", recipe)
    wanted = {_key(made_from[row.key], resolutions[row.bucket]): row for row in rows}
    if changed := blocks.changes():
        print(f"encode: changed since the last time: {', '.join(changed)}; all control maps are made anew", flush=True)
    blocks.open()
    missing = [wanted[key] for key in blocks.missing(wanted)]
    print(f"encode: {len(missing)} control maps to make", flush=True)
    with ThreadPoolExecutor(params.worker_count) as pool:  # decoding and OpenCV release the global interpreter lock
        pictures = _read_own(images, missing) if spec.kind == "own" else _read_images(images, missing)
        chunks = _chunks(pictures, resolutions)
        for resolution, chunk in progress(chunks, desc="encode: control maps", delay=2):
            maps = list(pool.map(lambda picture, to=resolution: _map(spec, picture, to), chunk))
            keys = [_key(made_from[picture.row.key], resolution) for picture in chunk]
            blocks.add(keys, {"control": torch.from_numpy(np.concatenate(maps))})
    blocks.forget(wanted)
    return Controls(blocks, made_from)


@dataclass(frozen=True)
class _Picture:
    """An encoded image, or map, of a row."""

    row: Row
    data: bytes
    pixels: int


def _own_maps(images: Path, rows: Sequence[Row]) -> dict[str, str]:
    """Return key -> SHA-256 of the map that the user gave for each image.

    Raises:
        StageError: if an image has none.
    """
    found = map_hashes(images)
    without = [row.key for row in rows if row.key not in found]
    if without:
        raise StageError(
            f"{len(without)} of {len(rows)} images have no control map ({without[0]}), and encode.control.kind 'own' "
            "needs one for each; add them to a folder 'conditioning' or a column 'conditioning_image', or set "
            "encode.control.kind to 'canny'"
        )
    return {row.key: found[row.key] for row in rows}


def _map(spec: ControlSpec, picture: _Picture, resolution: Resolution) -> np.ndarray:
    """Return the control map of a picture, uint8 [1, 1 or 3, h, w]."""
    if spec.kind != "own":
        return maps_of(spec, decoding.decode_resized(picture.data, picture.pixels, resolution, 3)[None])
    try:
        return decoding.decode_resized(picture.data, picture.pixels, resolution, 3)[None]
    except decoding.UnreadableError as error:
        raise StageError(
            f"the control map of {picture.row.key} cannot be read ({error}); replace it, and run 'dvc repro download'"
        ) from None


def _read_images(images: Path, rows: Sequence[Row]) -> Iterator[_Picture]:
    """Read images from which maps are made; equal ones may belong to several buckets."""
    by_content: dict[str, list[Row]] = {}
    for row in rows:
        by_content.setdefault(row.sha256, []).append(row)
    for sha256, data, pixels in read_encoded(images, by_content):
        for row in by_content[sha256]:
            yield _Picture(row, data, pixels)


def _read_own(images: Path, rows: Sequence[Row]) -> Iterator[_Picture]:
    """Read the maps that the user gave."""
    by_key = {row.key: row for row in rows}
    for key, _, data in read_maps(images, by_key) if by_key else ():
        yield _Picture(by_key[key], data, decoding.MAX_MAP_PIXELS)


def _chunks(
    pictures: Iterator[_Picture], resolutions: Sequence[Resolution]
) -> Iterator[tuple[Resolution, list[_Picture]]]:
    """Group pictures by the resolution of their bucket."""
    begun: dict[Resolution, list[_Picture]] = {}
    for picture in pictures:
        resolution = resolutions[picture.row.bucket]
        group = begun.setdefault(resolution, [])
        group.append(picture)
        if len(group) == CHUNK:
            yield resolution, begun.pop(resolution)
    yield from sorted(begun.items(), key=lambda item: item[0])
