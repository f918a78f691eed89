"""Which entries of `reports/metrics.json` are measurements, and which are facts about the measuring; and what `codec`
measured of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SPREAD, FLOOR, REAL = "_spread", "_floor", "_real"
QUALITY, RECONSTRUCTIONS = CODEC = "quality.json", "reconstructions.png"
"""Files of `outputs/codec` that `train` takes into its report, below `codec/`."""


def names(metrics: Mapping[str, Any]) -> list[str]:
    """Names of what was measured over the seed blocks, sorted: `name` is the mean, `name_spread` beside it."""
    return sorted(name for name in metrics if name + SPREAD in metrics and not name.endswith(FLOOR))


def values(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Each measurement with its spread, and with its floor and its value on real images where there are such."""
    wanted = [name + part for name in names(metrics) for part in ("", SPREAD, FLOOR, FLOOR + SPREAD, REAL)]
    return {name: float(metrics[name]) for name in wanted if name in metrics}


def facts(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What is neither a measurement nor nested: numbers of images, sampler, steps, fingerprint."""
    measured = values(metrics)
    return {name: value for name, value in metrics.items() if name not in measured and not isinstance(value, Mapping)}


def of_codec(folder: Path) -> dict[str, float]:
    """What an autoencoder loses and a text encoder understands on held-out images, as a run in MLflow names it; nothing
    where there is neither."""
    file = folder / QUALITY
    quality = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {f"codec/{name}": value for name, value in quality.items()}
