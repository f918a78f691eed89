"""What `evaluate` measured, each number with the guidance it was measured at; and what `codec` measured of itself.

Distances are always taken from unguided samples, label accuracy and CLIP score from guided ones, so the name of a
mean says which: `frechet_distance_unguided`, `label_accuracy_guided`. `measurements.json` holds everything,
`reports/metrics.json` the few numbers by which DVC compares experiments.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks.runtime import atomic
from tasks.runtime.errors import StageError

FILE = "measurements.json"
"""Its name in `reports/evaluation` and in the folder of a registered model."""
DISTANCE, ACCURACY, CLIP_SCORE = "frechet_distance", "label_accuracy", "clip_score"
HEADLINE = (DISTANCE, ACCURACY, CLIP_SCORE)
"""The measures of `reports/metrics.json`: what the gates judge, and the CLIP score."""
SHORT_FINGERPRINT = 12
QUALITY, RECONSTRUCTIONS = CODEC = "quality.json", "reconstructions.png"
"""Files of `outputs/codec` that `train` takes into its report, below `codec/`."""


class Measure(BaseModel):
    """The mean of one measure over the seed blocks, and what it is to be read against."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    spread: float
    """Sample standard deviation over the seed blocks."""
    drawn: Literal["unguided", "guided"]
    guidance_scale: float
    """1 is no guidance."""
    n: int
    """Samples in each seed block."""
    floor: float | None = None
    """The same measure of training images in the model's place."""
    floor_spread: float | None = None
    real: float | None = None
    """The same measure of the held-out images."""

    @property
    def condition(self) -> str:
        """What it was measured at, such as "guidance 1.5"."""
        return "unguided" if self.drawn == "unguided" else f"guidance {self.guidance_scale:g}"

    @property
    def reference(self) -> tuple[str, float] | None:
        """What real images reach, and what that is called."""
        if self.floor is not None:
            return "floor", self.floor
        return ("real images", self.real) if self.real is not None else None


class Measurements(BaseModel):
    """The content of `measurements.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2] = 2
    fingerprint: str
    """Only numbers that share it may be compared."""
    sampler: str
    steps: int
    eta: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    guided_scale: float | None = None
    """Guidance scale of the guided samples; None where the model draws without a condition."""
    seed_blocks: int
    extractor: str
    n_samples: int
    """Unguided samples in each seed block."""
    n_reference: int
    n_floor: int
    n_searched: int
    small_n: str | None = None
    """Why the distances say little."""
    clip_score_note: str | None = None
    measures: dict[str, Measure]
    not_applicable: dict[str, str]
    """Measures that are absent, each with the reason."""

    def flat(self) -> dict[str, float]:
        """Every number by a name of its own: `<measure>_<drawn>`, and beside it `_spread`, `_floor` and `_real`."""
        found: dict[str, float] = {}
        for name, measure in self.measures.items():
            found[mean_name(name, measure)] = measure.value
            beside = {"spread": measure.spread, "floor": measure.floor, "real": measure.real}
            beside["floor_spread"] = measure.floor_spread
            found |= {f"{name}_{part}": value for part, value in beside.items() if value is not None}
        return found | ({"guided_scale": self.guided_scale} if self.guided_scale is not None else {})

    def headline(self) -> dict[str, float | str]:
        """The content of `reports/metrics.json`: names short enough for a row of `dvc exp show`."""
        chosen = {mean_name(name, self.measures[name]) for name in HEADLINE if name in self.measures}
        chosen |= {f"{DISTANCE}_floor", "guided_scale"}
        numbers: dict[str, float | str] = {name: value for name, value in self.flat().items() if name in chosen}
        return numbers | {"fingerprint": self.fingerprint[:SHORT_FINGERPRINT]}

    def write(self, path: Path) -> None:
        atomic.write_json(path, self.model_dump(mode="json", exclude_none=True))


def mean_name(name: str, measure: Measure) -> str:
    """Name of a mean beside other numbers, such as `label_accuracy_guided`."""
    return f"{name}_{measure.drawn}"


def read(path: Path) -> Measurements:
    """Read `measurements.json`. Raises `StageError` where it is missing or of another version of this project."""
    try:
        return Measurements.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise StageError(f"{path} is missing; run 'dvc repro evaluate', which writes it") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise StageError(
            f"{path} was written by another version of this project ({where}: {first['msg']}); run 'dvc repro evaluate'"
        ) from None


def of_codec(folder: Path) -> dict[str, float]:
    """What an autoencoder loses and a text encoder understands on held-out images, as a run in MLflow names it; nothing
    where there is neither."""
    file = folder / QUALITY
    quality = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {f"codec/{name}": value for name, value in quality.items()}
