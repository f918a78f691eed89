"""The goals for one H100, as rows of the table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from infra.bench.gpu.plan import REFERENCE_DEFAULTS, Row

DEVICE = r"\bG?H100\b"


@dataclass(frozen=True)
class Goal:
    """A goal and what was reached; `reached` is None if a part that it needs was not measured."""

    text: str
    wanted: float
    reached: float | None
    on_its_device: bool

    @property
    def verdict(self) -> str:
        """Return "met" or "not met" on the device that the goal is for; else why it is neither."""
        if self.reached is None:
            return "not measured"
        if not self.on_its_device:
            return "for an H100"
        return "met" if self.reached >= self.wanted else "not met"

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "verdict": self.verdict}


def goals_of(rows: Sequence[Row], device_name: str) -> list[Goal]:
    """Compare the fastest training with the goals."""
    ours = _fastest(rows, lambda row: row.part == "training")
    defaults = _fastest(rows, lambda row: row.case == REFERENCE_DEFAULTS)
    in_bf16 = _fastest(rows, lambda row: row.part == "reference" and row.precision == "bf16")
    there = bool(re.search(DEVICE, device_name))
    return [
        Goal("images per second of the training, 35.7 M network", 10_000, ours, there),
        Goal("times the images per second of the reference with its defaults", 4, _ratio(ours, defaults), there),
        Goal("times the images per second of the reference in bf16, its fastest case", 2, _ratio(ours, in_bf16), there),
    ]


def _fastest(rows: Iterable[Row], chosen: Callable[[Row], bool]) -> float | None:
    return max((row.img_s for row in rows if row.img_s is not None and chosen(row)), default=None)


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours and theirs else None
