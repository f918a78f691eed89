"""Peak operations per second of GPUs, from the vendor's data sheets: dense matrix products, float32 accumulation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

Arithmetic: TypeAlias = Literal["bf16", "tf32", "fp32"]


@dataclass(frozen=True)
class Peak:
    """10^12 operations per second at maximum clock; None where the device has no such arithmetic."""

    bf16: float | None
    tf32: float | None
    fp32: float

    def of(self, arithmetic: Arithmetic) -> float | None:
        return {"bf16": self.bf16, "tf32": self.tf32, "fp32": self.fp32}[arithmetic]


PEAKS: tuple[tuple[str, Peak], ...] = (
    (r"\bB200\b", Peak(2250, 1125, 75)),
    (r"\bH100 PCIe\b", Peak(756, 378, 51.2)),
    (r"\bH100 NVL\b", Peak(835, 417, 60)),
    (r"\bG?H200\b", Peak(989, 494, 66.9)),
    (r"\bH100\b", Peak(989, 494, 66.9)),
    (r"\bA100\b", Peak(312, 156, 19.5)),
    (r"\bL4\b", Peak(121, 60, 30.3)),
    (r"\bT4\b", Peak(None, None, 8.1)),
    (r"\bRTX 3090\b", Peak(71, 35.6, 35.6)),
    (r"\bRTX 4090\b", Peak(165, 82.6, 82.6)),
)
"""Regular expression of a device name -> its peak; the first that matches counts."""


def peak_of(name: str) -> Peak | None:
    """Return the peak of the device that torch calls `name`; None if it is not listed."""
    return next((peak for pattern, peak in PEAKS if re.search(pattern, name) and not _variant(name)), None)


def _variant(name: str) -> bool:
    """Whether the name is of a laptop GPU or a Ti, which have other clocks and numbers of cores."""
    return bool(re.search(r"\b(Laptop|Max-Q|Ti|D)\b", name))
