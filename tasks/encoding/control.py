"""Control maps of all images: found in the scratch folder, or made in threads from images or from the user's maps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from models.networks.control_maps import ControlSpec, maps_of
from tasks.encoding.blocks import Blocks
from tasks.encoding.rows import Missing, buckets_in, digests_in
from tasks.pictures import decoding
from tasks.pictures.digests import digests
from tasks.pictures.images import map_hashes, read_encoded, read_maps
from tasks.runtime import closure, workspace
from tasks.runtime.errors import StageError
from tasks.runtime.progress import progress

if TYPE_CHECKING:
    from tasks.encoding.rows import Row, Rows
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
    own: Mapping[str, str] | None
    """Key of an image -> SHA-256 of the map that the user gave for it; None for maps that are made from the images."""

    def take(self, rows: Sequence[Row], resolution: Resolution) -> dict[str, torch.Tensor]:
        """Return the column `control` of images, uint8 [len(rows), 1 or 3, h, w]."""
        return self.blocks.take([_key(_made_from(row, self.own), resolution) for row in rows])


def _made_from(row: Row, own: Mapping[str, str] | None) -> str:
    """Return the SHA-256 of the file that the map of an image is made from."""
    return row.sha256 if own is None else own[row.key]


def _key(sha256: str, resolution: Resolution) -> str:
    return f"{sha256} {resolution[0]}x{resolution[1]}"


def make_controls(
    images: Path, resolutions: Sequence[Resolution], splits: Mapping[str, Rows], params: EncodeParams
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
    own = _own_maps(images, splits) if spec.kind == "own" else None
    blocks = Blocks(workspace.scratch() / "encode" / "controls", recipe)
    keys = (_key(_made_from(row, own), resolutions[row.bucket]) for row in _each(splits))
    wanted, first = np.unique(digests(keys), return_index=True)
    if changed := blocks.changes():
        print(f"encode: changed since the last time: {', '.join(changed)}; all control maps are made anew", flush=True)
    blocks.open()
    new = first[~blocks.known(wanted)]
    names = digests_in(splits, "sha256" if own is None else "key")
    missing = Missing(names[new], buckets_in(splits)[new], resolutions)
    print(f"encode: {len(missing)} control maps to make", flush=True)
    with ThreadPoolExecutor(params.worker_count) as pool:  # decoding and OpenCV release the global interpreter lock
        pictures = _read_images(images, missing) if own is None else _read_own(images, missing)
        for resolution, chunk in progress(_chunks(pictures), desc="encode: control maps", delay=2):
            maps = list(pool.map(lambda picture: _map(spec, picture), chunk))
            made = [_key(picture.sha256, resolution) for picture in chunk]
            blocks.add(made, {"control": torch.from_numpy(np.concatenate(maps))})
    blocks.forget(wanted)
    return Controls(blocks, own)


@dataclass(frozen=True)
class _Picture:
    """An image file from which a map is made, or a map."""

    name: str
    sha256: str
    resolution: Resolution
    """Of the map."""
    data: bytes
    pixels: int


def _each(splits: Mapping[str, Rows]) -> Iterator[Row]:
    for rows in splits.values():
        yield from rows


def _own_maps(images: Path, splits: Mapping[str, Rows]) -> dict[str, str]:
    """Return key -> SHA-256 of the map that the user gave for each image.

    Raises:
        StageError: if an image has none.
    """
    found = map_hashes(images)
    without = [row.key for row in _each(splits) if row.key not in found]
    if without:
        count = sum(map(len, splits.values()))
        raise StageError(
            f"{len(without)} of {count} images have no control map ({without[0]}), and encode.control.kind 'own' "
            "needs one for each; add them to a folder 'conditioning' or a column 'conditioning_image', or set "
            "encode.control.kind to 'canny'"
        )
    return found


def _map(spec: ControlSpec, picture: _Picture) -> np.ndarray:
    """Return the control map of a picture, uint8 [1, 1 or 3, h, w]."""
    if spec.kind != "own":
        return maps_of(spec, decoding.decode_resized(picture.data, picture.pixels, picture.resolution, 3)[None])
    try:
        return decoding.decode_resized(picture.data, picture.pixels, picture.resolution, 3)[None]
    except decoding.UnreadableError as error:
        raise StageError(
            f"the control map of {picture.name} cannot be read ({error}); replace it, and run 'dvc repro download'"
        ) from None


def _read_images(images: Path, missing: Missing) -> Iterator[_Picture]:
    """Read images from which maps are made, which are named by their SHA-256."""
    for sha256, data, pixels in read_encoded(images, missing.names):
        yield _Picture(sha256, sha256, missing.resolution(sha256), data, pixels)


def _read_own(images: Path, missing: Missing) -> Iterator[_Picture]:
    """Read the maps that the user gave for images, which are named by their keys."""
    for key, sha256, data in read_maps(images, missing.names) if len(missing) else ():
        yield _Picture(key, sha256, missing.resolution(key), data, decoding.MAX_MAP_PIXELS)


def _chunks(pictures: Iterable[_Picture]) -> Iterator[tuple[Resolution, list[_Picture]]]:
    """Group pictures by their resolution."""
    begun: dict[Resolution, list[_Picture]] = {}
    for picture in pictures:
        group = begun.setdefault(picture.resolution, [])
        group.append(picture)
        if len(group) == CHUNK:
            yield picture.resolution, begun.pop(picture.resolution)
    yield from sorted(begun.items(), key=lambda item: item[0])
