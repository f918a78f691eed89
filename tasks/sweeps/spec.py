"""The description of a sweep: a YAML file in `sweeps/`, validated before anything runs.

A sweep has a base preset, parameters that vary (`grid`, `points` or `search`) and training seeds. `evaluate` lists what
is measured from one trained model: each of its values is one more evaluation, not one more training.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from tasks.params import ParamsError, Section, read
from tasks.params.section import PositiveInt, Seed

FOLDER = Path(__file__).resolve().parents[2] / "sweeps"
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
Value = bool | int | float | str | list[int | float | str | bool] | None
"""A value of a parameter as in `params.yaml`."""
Values = Annotated[dict[str, Annotated[list[Value], Field(min_length=1)]], Field(min_length=1)]
"""Parameter -> the values that it takes."""
EVALUATED = ("sampler", "steps", "eta", "guidance", "guidance_scale", "guidance_interval")
"""Parameters of the section `evaluate` that draw from the same trained model; see `evaluate` of `Spec`."""
DISTANCES = ("frechet_distance", "kid", "cmmd", "near_copies")
SCORES = ("precision", "recall", "inception_score", "inception_style_score", "label_accuracy", "clip_score")
"""Measures of which a lower and a higher value is better."""
METRIC = re.compile(r"(\w+)_(unguided|guided)")
REMEDY = "correct the file, or compare it with sweeps/timesteps.yaml"


class SweepError(ValueError):
    """A sweep that cannot run; the message is one sentence with the remedy."""


class Interval(Section):
    """Range of a searched parameter, both ends included."""

    low: float
    high: float
    log: bool = False
    """Draw uniformly on a logarithmic scale."""
    integer: bool = False

    @model_validator(mode="after")
    def _check(self) -> Interval:
        if self.low >= self.high:
            raise ValueError(f"the range from {self.low:g} to {self.high:g} is empty; give the lower end first")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range cannot start at {self.low:g}; raise low above 0")
        return self


class Search(Section):
    """A search by Optuna's TPE sampler (Bergstra et al. 2011) instead of a grid."""

    trials: PositiveInt
    """Points to try; each is trained with every seed unless it is pruned."""
    parameters: Annotated[dict[str, Interval | Annotated[list[Value], Field(min_length=2)]], Field(min_length=1)]
    """Parameter -> its range, or a list of choices."""
    startup: PositiveInt = 4
    """Points that are drawn at random before the sampler models the results."""
    prune: bool = True
    """After each seed, stop a point whose mean is worse than the median of the others after as many seeds."""
    seed: Seed = 0
    """Seed of the sampler."""


class Spec(Section):
    """The content of a sweep file."""

    title: str
    question: str
    """What the sweep is to answer, in one sentence."""
    preset: str
    overrides: dict[str, Value] = Field(default={})
    """Parameters of all trials that differ from the preset."""
    grid: Values | None = None
    """Every combination of these values is trained."""
    points: Annotated[list[dict[str, Value]], Field(min_length=1)] | None = None
    """Instead of a grid: the combinations themselves."""
    search: Search | None = None
    seeds: Annotated[list[Seed], Field(min_length=1)]
    """Values of `train.seed`; their spread decides whether a difference is more than chance."""
    evaluate: Values | None = None
    """Parameters of the section `evaluate` -> values; every combination is measured from each trained model."""
    metrics: list[str] = Field(default=["frechet_distance_unguided"], min_length=1)
    """Columns of the leaderboard; the first one ranks."""

    @model_validator(mode="after")
    def _check(self) -> Spec:
        given = [name for name in ("grid", "points", "search") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; keep one")
        if self.search is not None and self.evaluate is not None:
            raise ValueError("search and evaluate exclude each other; write the value into overrides")
        if not given and self.evaluate is None:
            raise ValueError("nothing varies; add grid, points, search or evaluate")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {self.seeds} contain a value twice; remove it")
        for key in self.evaluate or {}:
            if key not in EVALUATED:
                raise ValueError(f"evaluate.{key} cannot vary in 'evaluate'; {_choices(key, EVALUATED)}")
        for metric in self.metrics:
            direction(metric)
        if len({tuple(sorted(point)) for point in self.points or []}) > 1:
            raise ValueError("the points set different parameters; name the same ones in each")
        fixed = {"train.seed", *self.overrides} & {*(self.grid or {}), *(self.points or [{}])[0]}
        if fixed:
            raise ValueError(f"{min(fixed)} both varies and is fixed; keep one (train.seed varies by 'seeds')")
        return self


def direction(metric: str) -> Literal["minimize", "maximize"]:
    """Return whether lower or higher values of a metric are better. Raises `ValueError` for an unknown one."""
    found = METRIC.fullmatch(metric)
    if found and found[1] in DISTANCES:
        return "minimize"
    if found and found[1] in SCORES:
        return "maximize"
    known = [f"{name}_{drawn}" for name in (*DISTANCES, *SCORES) for drawn in ("unguided", "guided")]
    raise ValueError(f"there is no metric '{metric}'; {_choices(metric, known)}")


def names(folder: Path = FOLDER) -> list[str]:
    """Names of the sweeps."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load(name: str, folder: Path = FOLDER) -> Spec:
    """Read and validate `sweeps/NAME.yaml`.

    Raises:
        SweepError: with one sentence that names the file, the key and the remedy.
    """
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise SweepError(f"there is no sweep '{name}' in {folder.name}/; {_choices(name, names(folder))}")
    if not NAME.fullmatch(name):
        raise SweepError(f"{folder.name}/{name}.yaml needs another name: lower-case letters, digits and hyphens only")
    try:
        document = read(path)
    except ParamsError:
        raise SweepError(f"{folder.name}/{name}.yaml is not valid YAML; {REMEDY}") from None
    if not isinstance(document, dict):
        raise SweepError(f"{folder.name}/{name}.yaml holds no keys; {REMEDY}")
    try:
        return Spec.model_validate(document)
    except ValidationError as error:
        raise SweepError(f"{folder.name}/{name}.yaml: {_sentence(error)}") from None


def _sentence(error: ValidationError) -> str:
    """The first error of pydantic as a clause with the remedy; an unknown key comes first."""
    errors = error.errors()
    first = next((entry for entry in errors if entry["type"] == "extra_forbidden"), errors[0])
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'; {_choices(key, list(Spec.model_fields))}"
    if first["type"] == "missing":
        return f"key '{key}' is missing; add it"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    return f"'{key}' is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}; {REMEDY}"


def _choices(word: str, known: list[str] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"there are {', '.join(known) or 'none'}"
