"""Whether a model version may be called champion: pure functions of the numbers in `reports/metrics.json`.

Each returns the reason against it, or None.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.params import RegisterParams

DISTANCE = "frechet_distance"
FLOOR = "frechet_distance_floor"
SPREAD = "frechet_distance_spread"
ACCURACY = "label_accuracy"
FINGERPRINT = "fingerprint"


def not_good_enough(metrics: Mapping[str, Any], params: RegisterParams) -> str | None:
    """The absolute gates: the distance as a multiple of its floor, and label accuracy where it applies."""
    ratio = metrics[DISTANCE] / metrics[FLOOR]
    if not ratio <= params.max_distance_over_floor:
        return (
            f"{DISTANCE} {metrics[DISTANCE]:.4g} is {ratio:.2f} times its floor {metrics[FLOOR]:.4g}, over "
            f"register.max_distance_over_floor {params.max_distance_over_floor:g}"
        )
    if ACCURACY in metrics and not metrics[ACCURACY] >= params.min_label_accuracy:
        return f"{ACCURACY} {metrics[ACCURACY]:.3f} is under register.min_label_accuracy {params.min_label_accuracy:g}"
    return None


def not_better(challenger: Mapping[str, Any], champion: Mapping[str, Any]) -> str | None:
    """The relative gate: a smaller distance than the champion's, by more than the larger spread between seed blocks.

    Raises `ValueError` where the two were not measured alike.
    """
    if challenger[FINGERPRINT] != champion[FINGERPRINT]:
        raise ValueError("numbers with different fingerprints are not comparable")
    spread = max(challenger[SPREAD], champion[SPREAD])
    if challenger[DISTANCE] < champion[DISTANCE] - spread:
        return None
    return (
        f"{DISTANCE} {challenger[DISTANCE]:.4g} does not beat the champion's {champion[DISTANCE]:.4g} by more than the "
        f"spread between seed blocks {spread:.3g}"
    )
