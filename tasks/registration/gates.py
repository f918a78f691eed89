"""The gates of the registry: whether a model version may become champion, as pure functions of its measures.

Each gate returns the reason against promotion, or None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.runtime import measures

if TYPE_CHECKING:
    from tasks.params import Headline, RegisterParams
    from tasks.runtime.measures import Measurements

FINGERPRINT, ACCURACY = "fingerprint", "label_accuracy_guided"
GUIDED_SCALE, GUIDED_KIND = "guided_scale", "guided_kind"
CONTROLS = (measures.CONTROL, f"{measures.CONTROL}_margin", f"{measures.CONTROL}_spread")
"""Flat names of the agreement with control maps, of its margin, and of its spread."""


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

    def tags(self) -> dict[str, str]:
        """Return the tags of a model version: the numbers as text, without loss of digits."""
        names = _distance_names(self.headline)
        values = (self.distance, self.spread, self.floor, self.label_accuracy, self.guided_scale)
        numbers = zip((*names, ACCURACY, GUIDED_SCALE), values, strict=True)
        kind = {GUIDED_KIND: self.guided_kind} if self.guided_kind is not None else {}
        known = {name: repr(value) for name, value in numbers if value is not None}
        controls = zip(CONTROLS, (self.control, self.control_margin, self.control_spread), strict=True)
        known |= {name: repr(value) for name, value in controls if value is not None}
        return {FINGERPRINT: self.fingerprint} | known | kind


def _distance_names(headline: Headline) -> tuple[str, str, str]:
    """Return the flat names of the mean of a distance, of its spread and of its floor."""
    return f"{headline}_unguided", f"{headline}_spread", f"{headline}_floor"


def judged(measured: Measurements) -> Judged:
    """Return the numbers of an evaluation that the gates compare."""
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
        *(flat.get(name) for name in CONTROLS),
    )


def from_tags(tags: Mapping[str, str], headline: Headline) -> Judged | None:
    """Read what `Judged.tags` wrote; None for versions that were registered with another headline or fewer tags."""
    names = _distance_names(headline)
    if not {FINGERPRINT, *names} <= tags.keys():
        return None
    distance, spread, floor = (float(tags[name]) for name in names)
    accuracy, scale = (float(tags[name]) if name in tags else None for name in (ACCURACY, GUIDED_SCALE))
    controls = (float(tags[name]) if name in tags else None for name in CONTROLS)
    kind = tags.get(GUIDED_KIND)
    return Judged(tags[FINGERPRINT], headline, distance, spread, floor, accuracy, scale, kind, *controls)


def not_good_enough(judged: Judged, params: RegisterParams) -> str | None:
    """Apply the absolute gates: distance as a multiple of its floor, and label accuracy if it applies."""
    distance, floor, accuracy = judged.distance, judged.floor, judged.label_accuracy
    if not floor > 0:  # KID is unbiased, so that of real images is about zero, and negative as often as not
        return (
            f"{judged.headline} {distance:.4g} (unguided) cannot be expressed as a multiple of its floor {floor:.4g}; "
            "set evaluate.headline to frechet_distance or cmmd"
        )
    ratio = distance / floor
    if not ratio <= params.max_distance_over_floor:
        return (
            f"{judged.headline} {distance:.4g} (unguided) is {ratio:.2f} times its floor {floor:.4g}, over "
            f"register.max_distance_over_floor {params.max_distance_over_floor:g}"
        )
    if accuracy is not None and not accuracy >= params.min_label_accuracy:
        return (
            f"{measures.ACCURACY} {accuracy:.3f} (guidance "
            f"{measures.guidance_name(judged.guided_scale or 1.0, judged.guided_kind)}) is under "
            f"register.min_label_accuracy {params.min_label_accuracy:g}"
        )
    if judged.control_margin is not None and not judged.control_margin >= params.min_control_margin:
        return (
            f"agreement with control maps {judged.control:.3f} is only {judged.control_margin:.3f} above what it is "
            f"with another map or without one, under register.min_control_margin {params.min_control_margin:g}"
        )
    return None


def not_better(challenger: Judged, champion: Judged) -> str | None:
    """Apply the relative gate: a distance below the champion's by more than the larger spread between seed blocks.

    A ControlNet leaves the distance of its U-Net as it is, so that two of them are compared by their agreement with the
    control maps, in the same way.

    Raises:
        ValueError: if the two have different fingerprints or distances.
    """
    if (challenger.fingerprint, challenger.headline) != (champion.fingerprint, champion.headline):
        raise ValueError("numbers with different fingerprints or of different distances are not comparable")
    if challenger.control is not None and champion.control is not None:
        return _not_more_faithful(challenger, champion.control, champion.control_spread or 0.0)
    spread = max(challenger.spread, champion.spread)
    if challenger.distance < champion.distance - spread:
        return None
    return (
        f"{challenger.headline} {challenger.distance:.4g} (unguided) does not beat the champion's "
        f"{champion.distance:.4g} by more than the spread between seed blocks {spread:.3g}"
    )


def _not_more_faithful(challenger: Judged, champion: float, champion_spread: float) -> str | None:
    spread = max(challenger.control_spread or 0.0, champion_spread)
    if challenger.control is not None and challenger.control > champion + spread:
        return None
    return (
        f"agreement with control maps {challenger.control:.3f} does not beat the champion's {champion:.3f} by more "
        f"than the spread between seed blocks {spread:.3g}"
    )
