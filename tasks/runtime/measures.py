"""The results of `evaluate` (`measurements.json`), and how reports present them.

Each number is stored with kind and scale of the guidance at which it was measured. Distances are measured on unguided
samples, label accuracy and CLIP score on guided ones, so the name of a mean says which: `frechet_distance_unguided`,
`label_accuracy_guided`. `measurements.json` holds all numbers, `reports/metrics.json` the few that DVC compares
between experiments. `Measurements.rows` is the one table of measures beside their references; terminal, Prefect,
MLflow and report format it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks.params import Headline
from tasks.runtime import atomic
from tasks.runtime.errors import StageError

FILE = "measurements.json"
"""File name in `reports/evaluation` and in the folder of a registered model."""
ACCURACY, CLIP_SCORE = "label_accuracy", "clip_score"
CONTROL = "control_agreement"
"""First part of the flat names of the agreement with control maps."""
SHORT_FINGERPRINT = 12
Drawn: TypeAlias = Literal["unguided", "guided"]


class Measure(BaseModel):
    """The mean of one measure over the seed blocks, and its reference value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    spread: float
    """Sample standard deviation over the seed blocks."""
    drawn: Drawn
    guidance_scale: float
    """1 disables guidance."""
    guidance_kind: str | None = None
    """A kind of guidance of `samplers.GUIDANCES`; None for unguided samples."""
    n: int
    """Samples in each seed block."""
    floor: float | None = None
    """The same measure of training images in place of samples; distances only."""
    floor_spread: float | None = None
    real: float | None = None
    """The same measure of the held-out images; scores only."""

    @property
    def guidance(self) -> str:
        """The guidance, such as "1.5" or "1.5, auto"; "none" for unguided samples."""
        return "none" if self.drawn == "unguided" else guidance_name(self.guidance_scale, self.guidance_kind)

    @property
    def condition(self) -> str:
        """How the samples were drawn: "unguided" or, for example, "guidance 1.5"."""
        return "unguided" if self.drawn == "unguided" else f"guidance {self.guidance}"

    @property
    def reference(self) -> Reference | None:
        """The score of real images: the floor of a distance, else the score of the held-out images."""
        if self.floor is not None:
            return Reference("floor", self.floor, self.floor_spread)
        return Reference("real images", self.real) if self.real is not None else None


@dataclass(frozen=True)
class Reference:
    """The score of real images in the same measurement."""

    name: str
    """"floor" or "real images"."""
    value: float
    spread: float | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g}"


@dataclass(frozen=True)
class Row:
    """A measure and its reference, as a row of a table; columns choose their own number of digits."""

    name: str
    guidance: str
    """See `Measure.guidance`."""
    value: float
    spread: float
    reference: Reference | None
    samples: str
    """Seed blocks x samples, such as "3 x 512"."""

    @property
    def beside(self) -> str:
        """The reference as text, such as "floor 10.2"; empty without one."""
        return str(self.reference or "")


class ControlMeasured(BaseModel):
    """How well samples follow their control maps: F1 of the edges, or agreement of the colours, 0 to 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    """Kind of the control maps, see `models/networks/control_maps.py`."""
    n: int
    """Samples in each seed block."""
    value: float
    """Of images drawn with the control map: the mean over the seed blocks, as all of these."""
    spread: float
    """Sample standard deviation of `value` over the seed blocks."""
    shuffled: float
    """The same of images drawn with the map of another image."""
    base: float
    """The same of images drawn without a map."""
    real: float
    """The same of the images that the maps belong to, after the codec: the most that can be reached."""

    @property
    def margin(self) -> float:
        """How much more the images follow their own map than they would if the model ignored it."""
        return float(f"{self.value - max(self.shuffled, self.base):.6g}")


class PrecisionMeasured(BaseModel):
    """How far images drawn in a lower precision, or by a compiled network, are from others of the same seeds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int
    """Images compared."""
    psnr_db: float
    """PSNR over all of them, in dB."""
    worst_psnr_db: float
    """PSNR of the image that differs most."""


class Measurements(BaseModel):
    """The content of `measurements.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2] = 2
    fingerprint: str
    """SHA-256 of the measurement's description; only numbers with the same fingerprint are comparable."""
    headline: Headline = "frechet_distance"
    """The distance that the gates compare and that reports lead with."""
    sampler: str
    steps: int
    eta: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    guided_scale: float | None = None
    """Guidance scale of the guided samples; None if none were drawn."""
    guided_kind: str | None = None
    """Their kind of guidance, of `samplers.GUIDANCES`."""
    precision: str | None = None
    """What the network that draws computed in; None for float32."""
    precision_parity: PrecisionMeasured | None = None
    """How near its images are to those of float32; None for float32, and where it was not measured."""
    compiled: bool | None = None
    """True if that network was compiled; else None."""
    compile_parity: PrecisionMeasured | None = None
    """How near its images are to those of the uncompiled network; None as for `precision_parity`."""
    seed_blocks: int
    extractor: str
    n_samples: int
    """Unguided samples in each seed block."""
    n_reference: int
    """Held-out images."""
    n_floor: int
    """Training images in each block of the floor."""
    n_searched: int
    """Training images among which near copies were searched for."""
    small_n: str | None = None
    """Why the distances are unreliable, if there were too few images."""
    clip_score_note: str | None = None
    """Why the CLIP score is biased, if it is."""
    measures: dict[str, Measure]
    control: ControlMeasured | None = None
    """Agreement with control maps; None for a model without a ControlNet."""
    not_applicable: dict[str, str]
    """Reason for each measure that was not taken."""

    def flat(self) -> dict[str, float]:
        """Return all numbers under flat names: `<measure>_<drawn>` for the mean, `<measure>_spread` and so on."""
        found: dict[str, float] = {}
        for name, measure in self.measures.items():
            found[mean_name(name, measure)] = measure.value
            beside = {"spread": measure.spread, "floor": measure.floor, "real": measure.real}
            beside["floor_spread"] = measure.floor_spread
            found |= {f"{name}_{part}": value for part, value in beside.items() if value is not None}
        if control := self.control:
            names = {"value": CONTROL, **{name: f"{CONTROL}_{name}" for name in ("spread", "shuffled", "base", "real")}}
            found |= {flat: getattr(control, name) for name, flat in names.items()}
            found[f"{CONTROL}_margin"] = control.margin
        return found | ({"guided_scale": self.guided_scale} if self.guided_scale is not None else {})

    def headline_numbers(self) -> dict[str, float | str]:
        """Return the content of `reports/metrics.json`: what the gates check, and the CLIP score.

        The names fit into a row of `dvc exp show`.
        """
        names = (self.headline, ACCURACY, CLIP_SCORE)
        chosen = {mean_name(name, self.measures[name]) for name in names if name in self.measures}
        chosen |= {f"{self.headline}_floor", "guided_scale", CONTROL, f"{CONTROL}_margin"}
        numbers: dict[str, float | str] = {name: value for name, value in self.flat().items() if name in chosen}
        numbers |= {"guided_kind": self.guided_kind} if self.guided_kind is not None else {}
        return numbers | {"fingerprint": self.fingerprint[:SHORT_FINGERPRINT]}

    def rows(self, names: Iterable[str] | None = None) -> list[Row]:
        """Return the measures beside their references; only those of `names`, in that order, if given.

        Without `names`, those that the gates check come first.
        """
        first = [name for name in (self.headline, ACCURACY, CLIP_SCORE) if name in self.measures]
        return [
            Row(name, measure.guidance, measure.value, measure.spread, measure.reference, self.samples(measure))
            for name in (dict.fromkeys([*first, *self.measures]) if names is None else names)
            if (measure := self.measures.get(name)) is not None
        ]

    def samples(self, measure: Measure) -> str:
        """Return the number of seed blocks and of samples in each, such as "3 x 512"."""
        return f"{self.seed_blocks} x {measure.n}"

    def write(self, path: Path) -> None:
        """Write `measurements.json`; equal values give equal bytes."""
        atomic.write_json(path, self.model_dump(mode="json", exclude_none=True))


def mean_name(name: str, measure: Measure) -> str:
    """Return the flat name of a mean, such as `label_accuracy_guided`."""
    return f"{name}_{measure.drawn}"


def draw_name(sampler: str, steps: int, guidance_scale: float, eta: float = 0.0, guidance: str | None = None) -> str:
    """Return a readable name of sampling settings, such as "ddim (eta 0.5), 50 steps, guidance 1.5"."""
    guided = guidance_name(guidance_scale, guidance)
    return f"{sampler}{f' (eta {eta:g})' if eta else ''}, {steps} steps, guidance {guided}"


def guidance_name(scale: float, kind: str | None) -> str:
    """Return a readable name of a guidance: "1.5" for classifier-free guidance, "1.5, auto" for autoguidance."""
    return f"{scale:g}, auto" if kind == "auto" and scale != 1 else f"{scale:g}"


def read(path: Path) -> Measurements:
    """Read `measurements.json`.

    Raises:
        StageError: if the file is missing or has another format.
    """
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
