"""How runs look in MLflow: their names, tags and descriptions, and metric names that fold into groups.

The MLflow UI groups metrics by what stands before the slash. Names and tags say what a run is: the preset, the
parameters in which it differs from that, the DVC experiment. Nothing here is read back to decide anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.runtime import lineage

if TYPE_CHECKING:
    from tasks.runtime.measures import Measurements

PRESET, DVC_EXPERIMENT, GIT_COMMIT = "preset", "dvc_experiment", "git_commit"
"""Tags with values short enough for a column of the runs table."""
SHORT_KEY, SHORT_COMMIT = 8, 8
NAMED_CHANGES = 3
"""Changed parameters that the name of a run holds; the others are counted."""
AFTER_TRAINING = ("judge", "visualize", "evaluate", "export", "register")
"""Sections of `params.yaml` that have no part in the weights."""
OF_EVALUATION = ("judge", "evaluate")
LOCAL = ("download.path", "train.init_from")
"""Parameters that say where something lies on this machine."""


@dataclass(frozen=True)
class Label:
    """Name and tags of a run."""

    name: str
    tags: dict[str, str]


def label(kind: str, key: str, params: Mapping[str, Any], params_file: Path = Path("params.yaml")) -> Label:
    """Name and tags of a new run with this key: `digits train.learning_rate=0.001 1a2b3c4d`.

    Its parameters are those of `params_file`, except where `params` has another value. Without that file the kind of
    the run stands in the preset's place.
    """
    preset, changes = _preset_and_changes(kind, params, params_file)
    more = [f"+{len(changes) - NAMED_CHANGES}"] if len(changes) > NAMED_CHANGES else []
    words = [preset or kind, *(["evaluation"] if preset and kind == "evaluation" else [])]
    commit = lineage.git_commit()
    tags = {
        PRESET: preset,
        DVC_EXPERIMENT: os.environ.get("DVC_EXP_NAME"),
        GIT_COMMIT: commit[:SHORT_COMMIT] if commit else None,
    }
    return Label(
        " ".join([*words, *changes[:NAMED_CHANGES], *more, key[:SHORT_KEY]]),
        {name: value for name, value in tags.items() if value},
    )


def _preset_and_changes(kind: str, params: Mapping[str, Any], params_file: Path) -> tuple[str | None, list[str]]:
    """Name of the preset, and `section.key=value` of each parameter of this kind of run that differs from it."""
    from tasks import preset
    from tasks.params import ParamsError, load

    try:
        document = load(params_file).model_dump(mode="json", by_alias=True)
    except ParamsError:
        return None, []
    name = document["preset"]
    try:
        usual = dict(_flat(preset.compose(name, _own_source(document))))
    except (preset.PresetError, ParamsError):
        return name, []
    given = {key: value for key, value in params.items() if key in usual}
    actual = {key: _plain(value) for key, value in ({**dict(_flat(document)), **given}).items()}
    changes = [
        f"{key}={_short(value)}"
        for key, value in actual.items()
        if _concerns(kind, key) and key in usual and value != _plain(usual[key])
    ]
    return name, changes


def _own_source(document: Mapping[str, Any]) -> list[str]:
    """Overrides for what a preset leaves to its user: where the images come from."""
    download = document["download"]
    values = {"download.path": download["path"], "download.hub.repo": download["hub"]["repo"]}
    return [f"{key}={value}" for key, value in values.items() if value]


def _concerns(kind: str, key: str) -> bool:
    section = key.split(".")[0]
    if key in LOCAL or section == "preset":
        return False
    return section in OF_EVALUATION if kind == "evaluation" else section not in AFTER_TRAINING


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _plain(value: Any) -> Any:
    """A value as JSON knows it; the parameters of a run hold lists as text."""
    if isinstance(value, str) and value.startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return list(value) if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"').replace(" ", "")


def training_metrics(values: Mapping[str, float]) -> dict[str, float]:
    """Names of the history -> names in MLflow: `train/loss`, `train/held_out_loss_std-0.10`."""
    return {f"train/{name.replace('/', '_')}": value for name, value in values.items()}


def evaluation_metrics(measured: Measurements) -> dict[str, float]:
    """Every number of an evaluation by its name in MLflow: `eval/frechet_distance_unguided`."""
    return {f"eval/{name}": value for name, value in measured.flat().items()}


def description(measured: Measurements, report: str | None) -> str:
    """The note of a run, Markdown: what was measured at which guidance, and the address of the report."""
    lines = ["| measure | guidance | value | spread | real images |", "|---|---|---|---|---|"]
    for row in measured.rows():
        reference = f"{row.reference.value:.4g}" if row.reference else ""
        lines.append(f"| {row.name} | {row.guidance} | {row.value:.4g} | {row.spread:.2g} | {reference} |")
    lines += ["", f"Sampler {measured.sampler}, {measured.steps} steps. Fingerprint `{measured.fingerprint[:12]}`."]
    lines += ["", f"[The report]({report}): samples, curves, tables."] if report else []
    return "\n".join(lines)
