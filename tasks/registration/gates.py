"""The gates of the registry: whether a model version may become champion, as pure functions of its measures.

Each gate returns the reason against promotion, or None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tasks.runtime import measures

if TYPE_CHECKING:
    from tasks.params import RegisterParams
    from tasks.runtime.measures import Measurements

DISTANCE, SPREAD, FLOOR = "frechet_distance_unguided", "frechet_distance_spread", "frechet_distance_floor"
ACCURACY, GUIDED_SCALE, FINGERPRINT = "label_accuracy_guided", "guided_scale", "fingerprint"


@dataclass(frozen=True)
class Judged:
    """The numbers that the gates compare; their names are the tags of a model version."""

    fingerprint: str
    frechet_distance_unguided: float
    frechet_distance_spread: float
    frechet_distance_floor: float
    label_accuracy_guided: float | None = None
    guided_scale: float | None = None

    def tags(self) -> dict[str, str]:
        """Return the numbers as text, without loss of digits."""
        return {name: value if isinstance(value, str) else repr(value) for name, value in self.numbers().items()}

    def numbers(self) -> dict[str, float | str]:
        """Return the numbers that apply."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def judged(measured: Measurements) -> Judged:
    """Return the numbers of an evaluation that the gates compare."""
    flat = measured.flat()
    return Judged(
        measured.fingerprint,
        flat[DISTANCE],
        flat[SPREAD],
        flat[FLOOR],
        flat.get(ACCURACY),
        measured.guided_scale if ACCURACY in flat else None,
    )


def from_tags(tags: Mapping[str, str]) -> Judged | None:
    """Read what `Judged.tags` wrote; None for versions that were registered without some of the tags."""
    numbers = {name: float(tags[name]) for name in (DISTANCE, SPREAD, FLOOR, ACCURACY, GUIDED_SCALE) if name in tags}
    if FINGERPRINT not in tags or not {DISTANCE, SPREAD, FLOOR} <= numbers.keys():
        return None
    return Judged(fingerprint=tags[FINGERPRINT], **numbers)


def not_good_enough(judged: Judged, params: RegisterParams) -> str | None:
    """Apply the absolute gates: distance as a multiple of its floor, and label accuracy if it applies."""
    distance, floor, accuracy = (
        judged.frechet_distance_unguided,
        judged.frechet_distance_floor,
        judged.label_accuracy_guided,
    )
    ratio = distance / floor
    if not ratio <= params.max_distance_over_floor:
        return (
            f"{measures.DISTANCE} {distance:.4g} (unguided) is {ratio:.2f} times its floor {floor:.4g}, over "
            f"register.max_distance_over_floor {params.max_distance_over_floor:g}"
        )
    if accuracy is not None and not accuracy >= params.min_label_accuracy:
        return (
            f"{measures.ACCURACY} {accuracy:.3f} (guidance {judged.guided_scale:g}) is under "
            f"register.min_label_accuracy {params.min_label_accuracy:g}"
        )
    return None


def not_better(challenger: Judged, champion: Judged) -> str | None:
    """Apply the relative gate: a distance below the champion's by more than the larger spread between seed blocks.

    Raises:
        ValueError: if the two have different fingerprints.
    """
    if challenger.fingerprint != champion.fingerprint:
        raise ValueError("numbers with different fingerprints are not comparable")
    spread = max(challenger.frechet_distance_spread, champion.frechet_distance_spread)
    if challenger.frechet_distance_unguided < champion.frechet_distance_unguided - spread:
        return None
    return (
        f"{measures.DISTANCE} {challenger.frechet_distance_unguided:.4g} (unguided) does not beat the champion's "
        f"{champion.frechet_distance_unguided:.4g} by more than the spread between seed blocks {spread:.3g}"
    )
