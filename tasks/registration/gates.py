"""The gates of the registry: whether a model version may become champion, as pure functions of its measures.

Each gate returns the reason against promotion, or None.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from tasks.runtime import measures

if TYPE_CHECKING:
    from tasks.params import Headline, RegisterParams
    from tasks.runtime.measures import Measurements

FINGERPRINT, ACCURACY = "fingerprint", "label_accuracy_guided"
CLIP, CLIP_REAL = f"{measures.CLIP_SCORE}_guided", f"{measures.CLIP_SCORE}_real"
NEAR_COPIES, SEED_BLOCKS, ONNX_PSNR = "near_copies_unguided", "seed_blocks", "onnx_min_psnr_db"
GUIDED_SCALE, GUIDED_KIND = "guided_scale", "guided_kind"
CONTROLS = (measures.CONTROL, f"{measures.CONTROL}_margin", f"{measures.CONTROL}_spread")
"""Flat names of the agreement with control maps, of its margin, and of its spread."""


MIN_SEED_BLOCKS = 3
"""Least number of seed blocks from which an interval is computed."""
EXTRAS = (CLIP, CLIP_REAL, NEAR_COPIES, ONNX_PSNR)
STUDENT = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)
"""95% quantiles of Student's t distribution with 1, 2, ... degrees of freedom; `_student` has those of more."""
NORMAL = 1.644854
"""95% quantile of the normal distribution."""


@dataclass(frozen=True)
class Judged:
    """The numbers that the gates compare."""

    fingerprint: str
    headline: Headline
    """Name of the distance."""
    distance: float
    """Mean over the seed blocks of unguided samples."""
    spread: float
    floor: float
    label_accuracy: float | None = None
    """Of guided samples; None where it does not apply."""
    guided_scale: float | None = None
    guided_kind: str | None = None
    control: float | None = None
    """Agreement with control maps; None for a model without a ControlNet."""
    control_margin: float | None = None
    """The same above what it is with another map, or without one."""
    control_spread: float | None = None
    clip: float | None = None
    """CLIP score of guided samples; None where it does not apply."""
    clip_real: float | None = None
    """The same of the held-out images with their own captions."""
    near_copies: float | None = None
    """Share of unguided samples that are near copies of training images."""
    onnx_psnr_db: float | None = None
    """PSNR between images of the ONNX bundle and of PyTorch, of the worst one."""
    seed_blocks: int = MIN_SEED_BLOCKS
    """Blocks of samples, each with a seed of its own, that `distance` and `spread` are taken over."""

    def tags(self) -> dict[str, str]:
        """Return the tags of a model version: the numbers as text, without loss of digits."""
        names = _distance_names(self.headline)
        values = (self.distance, self.spread, self.floor, self.label_accuracy, self.guided_scale)
        numbers = zip((*names, ACCURACY, GUIDED_SCALE), values, strict=True)
        kind = {GUIDED_KIND: self.guided_kind} if self.guided_kind is not None else {}
        known = {name: repr(value) for name, value in numbers if value is not None}
        controls = zip(CONTROLS, (self.control, self.control_margin, self.control_spread), strict=True)
        extras = zip(EXTRAS, (self.clip, self.clip_real, self.near_copies, self.onnx_psnr_db), strict=True)
        known |= {name: repr(value) for name, value in (*controls, *extras) if value is not None}
        known[SEED_BLOCKS] = str(self.seed_blocks)
        return {FINGERPRINT: self.fingerprint} | known | kind


def _distance_names(headline: Headline) -> tuple[str, str, str]:
    """Return the flat names of the mean of a distance, of its spread and of its floor."""
    return f"{headline}_unguided", f"{headline}_spread", f"{headline}_floor"


class _Controls(TypedDict):
    """The fields of `Judged` about control maps."""

    control: float | None
    control_margin: float | None
    control_spread: float | None


def judged(measured: Measurements, onnx_psnr_db: float | None = None) -> Judged:
    """Return the numbers of an evaluation, and of the export of the same weights, that the gates compare."""
    flat = measured.flat()
    distance, spread, floor = (flat[name] for name in _distance_names(measured.headline))
    return Judged(
        measured.fingerprint,
        measured.headline,
        distance,
        spread,
        floor,
        flat.get(ACCURACY),
        measured.guided_scale if ACCURACY in flat else None,
        measured.guided_kind if ACCURACY in flat else None,
        **_controls(flat),
        clip=flat.get(CLIP),
        clip_real=flat.get(CLIP_REAL),
        near_copies=flat.get(NEAR_COPIES),
        onnx_psnr_db=onnx_psnr_db,
        seed_blocks=measured.seed_blocks,
    )


def _controls(flat: Mapping[str, float]) -> _Controls:
    value, margin, spread = CONTROLS
    return {"control": flat.get(value), "control_margin": flat.get(margin), "control_spread": flat.get(spread)}


def from_tags(tags: Mapping[str, str], headline: Headline) -> Judged | None:
    """Read what `Judged.tags` wrote; None for versions that were registered with another headline or fewer tags."""
    names = _distance_names(headline)
    if not {FINGERPRINT, *names} <= tags.keys():
        return None
    distance, spread, floor = (float(tags[name]) for name in names)
    known = {name: float(tags[name]) for name in (ACCURACY, GUIDED_SCALE, *CONTROLS, *EXTRAS) if name in tags}
    return Judged(
        tags[FINGERPRINT],
        headline,
        distance,
        spread,
        floor,
        known.get(ACCURACY),
        known.get(GUIDED_SCALE),
        tags.get(GUIDED_KIND),
        **_controls(known),
        clip=known.get(CLIP),
        clip_real=known.get(CLIP_REAL),
        near_copies=known.get(NEAR_COPIES),
        onnx_psnr_db=known.get(ONNX_PSNR),
        seed_blocks=int(tags.get(SEED_BLOCKS, MIN_SEED_BLOCKS)),
    )


def not_good_enough(judged: Judged, params: RegisterParams) -> str | None:
    """Apply the absolute gates, and return the first reason against promotion."""
    return next(_reasons(judged, params), None)


def _reasons(judged: Judged, params: RegisterParams) -> Iterator[str]:
    if judged.seed_blocks < MIN_SEED_BLOCKS:
        yield f"{judged.seed_blocks} seed blocks give no interval; measure with at least {MIN_SEED_BLOCKS}"
    yield from _distance(judged, params)
    yield from _conditions(judged, params)
    yield from _safety(judged, params)


def _distance(judged: Judged, params: RegisterParams) -> Iterator[str]:
    distance, floor = judged.distance, judged.floor
    if not floor > 0:  # KID is unbiased, so that of real images is about zero, and negative as often as not
        yield (
            f"{judged.headline} {distance:.4g} (unguided) cannot be expressed as a multiple of its floor {floor:.4g}; "
            "set evaluate.headline to frechet_distance or cmmd"
        )
        return
    ratio = distance / floor
    if not ratio <= params.max_distance_over_floor:
        yield (
            f"{judged.headline} {distance:.4g} (unguided) is {ratio:.2f} times its floor {floor:.4g}, over "
            f"register.max_distance_over_floor {params.max_distance_over_floor:g}"
        )


def _conditions(judged: Judged, params: RegisterParams) -> Iterator[str]:
    """How well images fit their label, their prompt and their control map, where these apply."""
    accuracy = judged.label_accuracy
    if accuracy is not None and not accuracy >= params.min_label_accuracy:
        yield (
            f"{measures.ACCURACY} {accuracy:.3f} (guidance "
            f"{measures.guidance_name(judged.guided_scale or 1.0, judged.guided_kind)}) is under "
            f"register.min_label_accuracy {params.min_label_accuracy:g}"
        )
    if judged.clip is not None and judged.clip_real is not None:
        least = params.min_clip_over_real * judged.clip_real
        if not judged.clip >= least:
            yield (
                f"{measures.CLIP_SCORE} {judged.clip:.4g} is under {least:.4g}, register.min_clip_over_real "
                f"{params.min_clip_over_real:g} times that of real images"
            )
    if judged.control_margin is not None and not judged.control_margin >= params.min_control_margin:
        yield (
            f"agreement with control maps {judged.control:.3f} is only {judged.control_margin:.3f} above what it is "
            f"with another map or without one, under register.min_control_margin {params.min_control_margin:g}"
        )


def _safety(judged: Judged, params: RegisterParams) -> Iterator[str]:
    """Copies of training images, and a bundle that draws other images than the weights."""
    copies, psnr = judged.near_copies, judged.onnx_psnr_db
    if copies is not None and not copies <= params.max_near_copies:
        yield (
            f"{copies:.1%} of the samples are near copies of training images, over register.max_near_copies "
            f"{params.max_near_copies:g}"
        )
    if psnr is not None and not psnr >= params.min_onnx_psnr:
        yield (
            f"images of the ONNX bundle agree with PyTorch's to {psnr:.0f} dB, under register.min_onnx_psnr "
            f"{params.min_onnx_psnr:g}"
        )


def not_better(challenger: Judged, champion: Judged) -> str | None:
    """Apply the relative gate: a distance below the champion's by more than chance explains.

    The difference of the two means over the seed blocks must be larger than the half-width of its one-sided 95%
    interval (Welch's t-test). A ControlNet leaves the distance of its U-Net as it is, so that two of them are compared
    by their agreement with the control maps, in the same way.

    Raises:
        ValueError: if the two have different fingerprints or distances.
    """
    if (challenger.fingerprint, challenger.headline) != (champion.fingerprint, champion.headline):
        raise ValueError("numbers with different fingerprints or of different distances are not comparable")
    blocks = challenger.seed_blocks, champion.seed_blocks
    if challenger.control is not None and champion.control is not None:
        width = interval((challenger.control_spread or 0.0, champion.control_spread or 0.0), blocks)
        if challenger.control > champion.control + width:
            return None
        return (
            f"agreement with control maps {challenger.control:.3f} does not beat the champion's "
            f"{champion.control:.3f} by more than the 95% interval of the difference over {blocks[0]} seed blocks, "
            f"{width:.3g}"
        )
    width = interval((challenger.spread, champion.spread), blocks)
    if challenger.distance < champion.distance - width:
        return None
    return (
        f"{challenger.headline} {challenger.distance:.4g} (unguided) does not beat the champion's "
        f"{champion.distance:.4g} by more than the 95% interval of the difference over {blocks[0]} seed blocks, "
        f"{width:.3g}"
    )


def interval(spreads: tuple[float, float], blocks: tuple[int, int]) -> float:
    """Half-width of the one-sided 95% interval of the difference of two means (Welch 1947).

    Args:
        spreads: Sample standard deviations over the blocks.
        blocks: Numbers of blocks.
    """
    parts = [spread**2 / n for spread, n in zip(spreads, blocks, strict=True)]
    variance = sum(parts)
    if variance == 0:
        return 0.0
    # A single block has no spread, and counts as one degree of freedom.
    freedom = variance**2 / sum(part**2 / max(n - 1, 1) for part, n in zip(parts, blocks, strict=True))
    return _student(max(1, int(freedom + 1e-9))) * math.sqrt(variance)


def _student(freedom: int) -> float:
    """95% quantile of Student's t distribution; above 10 degrees of freedom by the expansion of Fisher (1925)."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    first = (NORMAL**3 + NORMAL) / 4
    second = (5 * NORMAL**5 + 16 * NORMAL**3 + 3 * NORMAL) / 96
    return NORMAL + first / freedom + second / freedom**2
