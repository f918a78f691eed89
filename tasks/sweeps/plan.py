"""The trials of a sweep: which parameters each trains with, and which evaluations are made of its model."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tasks.params import ParamsError, composition
from tasks.sweeps.spec import SweepError, Value

if TYPE_CHECKING:
    from models.json_files import JsonObject
    from tasks.sweeps.spec import Interval, Search, Spec

Settings = Mapping[str, Value]
"""Parameter -> value."""
SEED = "train.seed"


@dataclass(frozen=True)
class Evaluation:
    """One measurement of one trained model."""

    trained: Settings
    """Parameters that vary and need a training of their own."""
    measured: Settings
    """Parameters of the section `evaluate` that vary."""
    seed: int
    overrides: tuple[str, ...]
    """All overrides of the preset, `key=value`."""
    document: JsonObject = field(repr=False)
    """The whole parameter file."""

    @property
    def settings(self) -> Settings:
        """All parameters that vary, except the seed."""
        return {**self.trained, **self.measured}

    @property
    def case(self) -> str:
        """The settings in words, equal for all seeds."""
        return words(self.settings)

    @property
    def label(self) -> str:
        return f"{self.case}, seed {self.seed}"

    @property
    def slug(self) -> str:
        """The label as a part of a Git reference or of a folder's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.label.lower().replace(".", "p")).strip("-")


@dataclass(frozen=True)
class Trial:
    """One training, and the evaluations of its model."""

    evaluations: tuple[Evaluation, ...]

    @property
    def label(self) -> str:
        first = self.evaluations[0]
        return f"{words(first.trained)}, seed {first.seed}"


def words(settings: Settings) -> str:
    """Return, for example, "timesteps 100, schedule linear"; "the preset" without settings."""
    names = shortened(list(settings))
    return ", ".join(f"{names[key]} {text(value)}" for key, value in settings.items()) or "the preset"


def shortened(keys: Sequence[str]) -> dict[str, str]:
    """Return the last part of each dotted key, or all of it if two have the same last part."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def text(value: Value) -> str:
    """Return a value as it is written in an override."""
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, separators=(",", ":"))


def trials(spec: Spec, overrides: Sequence[str] = ()) -> list[Trial]:
    """Return every trial of a sweep without a search, one point after the other for each seed.

    `overrides` (`key=value`) apply to all of them. Raises `SweepError` if the parameters of one are not valid.
    """
    return [trial(spec, point, seed, overrides) for seed in spec.seeds for point in _points(spec)]


def trial(spec: Spec, point: Settings, seed: int, overrides: Sequence[str] = ()) -> Trial:
    """Return the trial that trains `point` with `seed`. Raises `SweepError` if its parameters are not valid."""
    return Trial(tuple(_evaluation(spec, point, variant, seed, overrides) for variant in _variants(spec)))


def settings(spec: Spec) -> Iterator[tuple[Settings, Settings]]:
    """Yield every trained point with every variant of its evaluation; nothing for a search."""
    if spec.search is None:
        yield from itertools.product(_points(spec), list(_variants(spec)))


def _points(spec: Spec) -> Iterator[Settings]:
    if spec.points is not None:
        yield from spec.points
    else:
        yield from _product(spec.grid or {})


def _variants(spec: Spec) -> Iterator[Settings]:
    yield from _product({f"evaluate.{name}": values for name, values in (spec.evaluate or {}).items()})


def _product(values: Mapping[str, Sequence[Value]]) -> Iterator[Settings]:
    for combination in itertools.product(*values.values()):
        yield dict(zip(values, combination, strict=True))


def _evaluation(spec: Spec, point: Settings, variant: Settings, seed: int, overrides: Sequence[str]) -> Evaluation:
    # The curve over guidance scales has the scale of this evaluation alone, so that its distances are measured too.
    scale = variant.get("evaluate.guidance_scale")
    curve: dict[str, Value] = {"evaluate.guidance_sweep": [scale]} if isinstance(scale, int | float) else {}
    values = {**spec.overrides, **point, SEED: seed, **curve, **variant}
    written = (*(f"{key}={text(value)}" for key, value in values.items()), *overrides)
    try:
        document = composition.compose(spec.preset, list(written))
    except (composition.PresetError, ParamsError) as error:
        raise SweepError(f"{words({**point, **variant})}: {error}") from None
    return Evaluation(point, variant, seed, written, document)


def validate(spec: Spec, overrides: Sequence[str] = ()) -> int:
    """Check the parameters of every trial, of a search those of its corners; returns the number of trainings.

    Raises:
        SweepError: with one sentence.
    """
    if spec.search is None:
        return len(trials(spec, overrides))
    for point in _corners(spec.search):
        trial(spec, point, spec.seeds[0], overrides)
    return spec.search.trials * len(spec.seeds)


def _corners(search: Search) -> Iterator[Settings]:
    """The lowest and the highest values of all parameters of a search, and every choice."""
    values = {key: _ends(each) for key, each in search.parameters.items()}
    first = {key: choices[0] for key, choices in values.items()}
    yield from ({**first, key: choice} for key, choices in values.items() for choice in choices)


def _ends(values: Interval | list[Value]) -> list[Value]:
    if isinstance(values, list):
        return values
    return [round(end) if values.integer else end for end in (values.low, values.high)]
