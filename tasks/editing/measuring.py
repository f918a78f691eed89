"""The sweep over strengths and the comparison of fills: what is drawn, and the row of numbers of each set of images.

Distances compare features of the judge. `frechet_*` compare sets of images, and are biased upwards for few images by
as much in every row; `feature_distance` is the mean Euclidean distance between each image and its own original.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from models import masks
from models.editing import GREY, edit
from models.images.pixels import to_uint8
from models.judges import metrics
from models.noise.editing import steps_of, stretches
from tasks.editing.subjects import agreement
from tasks.runtime.progress import progress

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from models.judges.judge import Judge
    from models.pipeline import Pipeline
    from tasks.editing.drafts import Drafts
    from tasks.editing.subjects import Condition, Subjects
    from tasks.params import EditParams

Row: TypeAlias = "Mapping[str, float | int | str | None]"
"""A row of a table by column; None where a measure does not apply."""
MAKERS: dict[str, Callable[[int, int], np.ndarray]] = {"centre": masks.centre, "half": masks.half}
FILLS = ("model", "wrong condition", "mean fill", "copied patch", "original")
MAX_PSNR = 100.0
"""Decibel of equal images."""
SEARCH_BLOCK = 64
"""Training images that are compared at a time."""


@dataclass(frozen=True)
class Bench:
    """A model with the images that it edits and the judge that measures them."""

    model: Pipeline
    judge: Judge
    subjects: Subjects
    params: EditParams
    drafts: Drafts

    def draw(self, name: str, condition: Condition, strength: float, mask: np.ndarray | None = None) -> np.ndarray:
        """Edit all images from the same seeds, uint8 [N, C, S, S], or take them from the drafts."""
        return self.drafts.get(name, lambda: self._draw(name, condition, strength, mask))

    def _draw(self, name: str, condition: Condition, strength: float, mask: np.ndarray | None) -> np.ndarray:
        params, pixels = self.params, self.subjects.pixels
        repeated = mask is not None and not self.model.context_channels  # inpainting without an inpainting U-Net
        resampling, taken = params.resampling if repeated else 1, steps_of(strength, params.steps)
        steps = sum(end - first for first, end in stretches(taken, params.jump, resampling))
        with progress(desc=f"edit: {name}", total=steps * len(pixels), unit="step", unit_scale=True, delay=1) as bar:
            drawn = edit(
                self.model,
                range(params.seed, params.seed + len(pixels)),
                pixels,
                strength,
                mask,
                **condition,
                sampling=params.sampling,
                resampling=resampling,
                jump=params.jump,
                feather=params.feather,
                batch_size=params.batch_size,
                callback=lambda i, t, x, x0: bar.update(len(x)),
            )
        return to_uint8(drawn)

    @functools.cached_property
    def features_of_given(self) -> tuple[np.ndarray, np.ndarray]:
        """Features of the originals and of the reference, float32 [N, D] and [M, D]."""
        return self.judge.features(self.subjects.pixels), self.judge.features(self.subjects.reference)

    def distances(self, pixels: np.ndarray) -> dict[str, float]:
        """Return the distances of edited images to their originals and to the reference."""
        features, (original, reference) = self.judge.features(pixels), self.features_of_given
        return {
            "feature_distance": float(np.linalg.norm(features - original, axis=1).mean()),
            "frechet_to_input": metrics.frechet_distance(features, original),
            "frechet_to_data": metrics.frechet_distance(features, reference),
        }


def strengths(bench: Bench) -> Iterator[tuple[Row, np.ndarray]]:
    """Yield the row and the images of each strength, asking each image to become what it is not.

    `asked_share_ignored` is the control: the same edits from the same seeds, asking for what the image shows.
    """
    subjects = bench.subjects
    for strength in bench.params.strengths:
        drawn = bench.draw(f"strength-{strength:g}", subjects.asked, strength)
        asked = ignored = None
        if subjects.conditional:
            asked = agreement(bench.judge, drawn, subjects.asked, subjects.own)
            control = bench.draw(f"control-{strength:g}", subjects.own, strength)
            ignored = agreement(bench.judge, control, subjects.asked, subjects.own)
        yield (
            {
                "strength": strength,
                "n": len(drawn),
                "psnr": psnr(drawn, subjects.pixels),
                **bench.distances(drawn),
                "asked_share": asked,
                "asked_share_ignored": ignored,
            },
            drawn,
        )


def fills(bench: Bench) -> Iterator[tuple[Row, np.ndarray]]:
    """Yield the row and the images of each mask and each way to fill it, in the order of `FILLS`.

    The masks of one kind are the same for every way. "wrong condition" asks the model for what the image does not
    show; an unconditional model has no such row.
    """
    subjects = bench.subjects
    for kind in bench.params.masks:
        mask = masks_of(kind, subjects.pixels, bench.params.seed)
        for way in FILLS:
            if way == "wrong condition" and not subjects.conditional:
                continue
            filled = _filled(bench, kind, way, mask)
            wrong = (filled != subjects.pixels) & ~mask[:, None]
            yield (
                {
                    "mask": kind,
                    "fill": way,
                    "n": len(filled),
                    "masked_share": float(mask.mean()),
                    "known_error": int(np.abs(filled.astype(int) - subjects.pixels)[wrong].max(initial=0)),
                    "psnr": psnr(filled, subjects.pixels, mask),
                    **bench.distances(filled),
                    "own_share": agreement(bench.judge, filled, subjects.own, subjects.asked),
                },
                filled,
            )


def _filled(bench: Bench, kind: str, way: str, mask: np.ndarray) -> np.ndarray:
    subjects, inside = bench.subjects, mask[:, None]
    if way == "model":
        return bench.draw(f"fill-{kind}", subjects.own, 1.0, mask)
    if way == "wrong condition":
        return bench.draw(f"wrong-{kind}", subjects.asked, 1.0, mask)
    if way == "mean fill":
        return np.where(inside, mean_of_known(subjects.pixels, mask), subjects.pixels)
    if way == "copied patch":
        return np.where(inside, nearest_by_known(subjects.pixels, mask, subjects.training), subjects.pixels)
    return subjects.pixels


def masks_of(kind: str, pixels: np.ndarray, seed: int) -> np.ndarray:
    """Return a mask for each image, bool [N, S, S]; strokes differ between images."""
    count, (height, width) = len(pixels), pixels.shape[-2:]
    if kind == "strokes":
        return np.stack([masks.strokes(height, width, seed + number) for number in range(count)])
    return np.repeat(MAKERS[kind](height, width)[None], count, axis=0)


def masked_of(kind: str, pixels: np.ndarray, seed: int) -> np.ndarray:
    """Return the images with the masked pixels in grey, uint8 [N, C, S, S]."""
    return np.where(masks_of(kind, pixels, seed)[:, None], np.uint8(GREY), pixels)


def mean_of_known(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return each image's mean colour outside its mask, uint8 [N, C, 1, 1]."""
    known = ~mask[:, None]
    total = (pixels * known).sum(axis=(2, 3), keepdims=True, dtype=np.float64)
    return (total / np.maximum(known.sum(axis=(2, 3), keepdims=True), 1)).round().astype(np.uint8)


def nearest_by_known(pixels: np.ndarray, mask: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Return for each image the training image that is nearest to it outside its mask, uint8 [N, C, S, S]."""
    known = np.broadcast_to(~mask[:, None], pixels.shape).reshape(len(pixels), -1).astype(np.float32)
    wanted = pixels.reshape(len(pixels), -1) * known
    best, index = np.full(len(pixels), np.inf), np.zeros(len(pixels), np.int64)
    for start in range(0, len(training), SEARCH_BLOCK):
        block = training[start : start + SEARCH_BLOCK].reshape(-1, wanted.shape[1]).astype(np.float32)
        squares = known @ (block**2).T - 2 * wanted @ block.T  # without |wanted|^2, which is the same for all
        nearest = squares.argmin(axis=1)
        smallest = squares[np.arange(len(pixels)), nearest]
        index = np.where(smallest < best, start + nearest, index)
        best = np.minimum(best, smallest)
    return training[index]


def psnr(images: np.ndarray, originals: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Return the mean PSNR in dB of uint8 images against their originals, inside a mask if one is given."""
    squares = (images.astype(np.float64) - originals) ** 2
    inside = np.ones(squares.shape, bool) if mask is None else np.broadcast_to(mask[:, None], squares.shape)
    errors = (squares * inside).sum(axis=(1, 2, 3)) / np.maximum(inside.sum(axis=(1, 2, 3)), 1)
    values = [min(10 * math.log10(255**2 / error), MAX_PSNR) if error > 0 else MAX_PSNR for error in errors]
    return float(np.mean(values))


def headline(swept: Sequence[Row], filled: Sequence[Row], count: int) -> dict[str, object]:
    """Return the content of `reports/edits.json`: the best strength, and each mask's fill beside the other fills."""
    found: dict[str, object] = {"images": count}
    asked = [row for row in swept if row["asked_share"] is not None]
    if asked:
        best = max(asked, key=lambda row: float(row["asked_share"] or 0))
        names = ("strength", "asked_share", "asked_share_ignored", "psnr", "frechet_to_data")
        found["image_to_image"] = {name: best[name] for name in names}
    inpainting: dict[str, dict[str, object]] = {}
    for row in filled:
        entry = inpainting.setdefault(str(row["mask"]), {})
        if row["fill"] == "model":
            entry["known_error"] = row["known_error"]
        suffix = "" if row["fill"] == "model" else f"_{str(row['fill']).replace(' ', '_')}"
        of_originals = row["fill"] == "original"  # the floor of the distance to the data; the others are constants
        for name in ("frechet_to_data",) if of_originals else ("feature_distance", "frechet_to_data", "own_share"):
            if row[name] is not None:
                entry[f"{name}{suffix}"] = row[name]
    if inpainting:
        found["inpainting"] = inpainting
    return found
