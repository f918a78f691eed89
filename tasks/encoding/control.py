"""Control maps of all images: found in the scratch folder, or made in threads from images or from the user's maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from models.control import ControlSpec, maps_of
from tasks.encoding.blocks import Blocks
from tasks.pictures import decoding
from tasks.pictures.images import read_encoded
from tasks.runtime import closure, workspace
from tasks.runtime.progress import progress

if TYPE_CHECKING:
    from tasks.encoding.rows import Row
    from tasks.formats.buckets import Resolution
    from tasks.params import EncodeParams

CHUNK = 64
"""Images per block at most."""

Wanted: TypeAlias = "dict[str, list[Resolution]]"
"""SHA-256 of an image -> resolutions of the maps that are missing."""


def spec_of(params: EncodeParams) -> ControlSpec | None:
    """Return the specification of the control maps; None without them."""
    return ControlSpec(**params.control.model_dump()) if params.control else None


def control_key(row: Row, resolution: Resolution) -> str:
    """Return what identifies the control map of an image in the scratch folder."""
    return f"{row.sha256} {resolution[0]}x{resolution[1]}"


def make_controls(
    images: Path, resolutions: Sequence[Resolution], splits: Mapping[str, Sequence[Row]], params: EncodeParams
) -> Blocks | None:
    """Make the control maps that are not stored yet; returns those of all images, or None without `encode.control`."""
    spec = spec_of(params)
    if spec is None:
        return None
    recipe = {
        "control": spec.to_json(),
        "code of the control maps": closure.digest("models/control.py", "tasks/pictures/decoding.py"),
    }
    blocks = Blocks(workspace.scratch() / "encode" / "controls", recipe)
    wanted = {
        control_key(row, resolutions[row.bucket]): (row.sha256, resolutions[row.bucket])
        for rows in splits.values()
        for row in rows
    }
    if changed := blocks.changes():
        print(f"encode: changed since the last time: {', '.join(changed)}; all control maps are made anew", flush=True)
    blocks.open()
    missing: Wanted = {}
    for key in blocks.missing(wanted):
        sha256, resolution = wanted[key]
        missing.setdefault(sha256, []).append(resolution)
    print(f"encode: {len(missing)} control maps to make", flush=True)
    with ThreadPoolExecutor(params.workers) as pool:  # decoding and OpenCV release the global interpreter lock
        bar = progress(_chunks(images, missing), desc="encode: control maps", delay=2)
        for resolution, chunk in bar:
            maps = list(pool.map(lambda image, to=resolution: _map(spec, image, to), chunk))
            keys = [f"{sha256} {resolution[0]}x{resolution[1]}" for sha256, _, _ in chunk]
            blocks.add(keys, {"control": torch.from_numpy(np.concatenate(maps))})
    blocks.forget(wanted)
    return blocks


def _map(spec: ControlSpec, image: tuple[str, bytes, int], resolution: Resolution) -> np.ndarray:
    """Return the control map of an encoded image, uint8 [1, 1 or 3, h, w]."""
    _, data, pixels = image
    return maps_of(spec, decoding.decode_resized(data, pixels, resolution, 3)[None])


def _chunks(images: Path, missing: Wanted) -> Iterator[tuple[Resolution, list[tuple[str, bytes, int]]]]:
    """Read the images whose maps are missing, grouped by resolution."""
    begun: dict[Resolution, list[tuple[str, bytes, int]]] = {}
    for image in read_encoded(images, missing):
        for resolution in missing[image[0]]:
            group = begun.setdefault(resolution, [])
            group.append(image)
            if len(group) == CHUNK:
                yield resolution, begun.pop(resolution)
    yield from sorted(begun.items())
