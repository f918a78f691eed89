"""Names, tags, descriptions and metric names of MLflow runs.

The MLflow UI groups metrics by the prefix before the slash. The name of a run contains the preset and the parameters
that differ from it; a tag names the DVC experiment. They are for readers only: no code depends on them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.json_files import JsonObject
from tasks.params import ParamsError, composition, load
from tasks.runtime import lineage

if TYPE_CHECKING:
    from tasks.runtime.measures import Measurements

PRESET, DVC_EXPERIMENT, GIT_COMMIT = "preset", "dvc_experiment", "git_commit"
"""Tags with short values, for columns of the runs table."""
SHORT_KEY, SHORT_COMMIT = 8, 8
NAMED_CHANGES = 3
"""Most changed parameters in the name of a run; the others are counted."""
AFTER_TRAINING = ("judge", "visualize", "evaluate", "edit", "export", "register")
"""Sections of `params.yaml` that do not affect the weights."""
OF_EVALUATION = ("judge", "evaluate")
LOCAL = ("download.path", "train.init_from")
"""Parameters that are paths on this machine."""


@dataclass(frozen=True)
class Label:
    """Name and tags of a run."""

    name: str
    tags: dict[str, str]


def label(kind: str, key: str, params: Mapping[str, object], params_file: Path = Path("params.yaml")) -> Label:
    """Return name and tags of a new run, such as `digits train.learning_rate=0.001 1a2b3c4d`.

    Args:
        kind: "training" or "evaluation".
        key: Key of the run; the name ends with its first characters.
        params: Parameters of the run; they take precedence over `params_file`.
        params_file: The parameter file. Without it, the name contains the kind instead of the preset.
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


def _preset_and_changes(kind: str, params: Mapping[str, object], params_file: Path) -> tuple[str | None, list[str]]:
    """Name of the preset, and `section.key=value` of each parameter of this kind of run that differs from it."""
    try:
        document = load(params_file).model_dump(mode="json", by_alias=True)
    except ParamsError:
        return None, []
    name = document["preset"]
    try:
        usual = dict(composition.flatten(composition.compose(name, _source_overrides(document))))
    except (composition.PresetError, ParamsError):
        return name, []
    own = {key: value for key, value in params.items() if key in usual}
    actual = {key: _plain(value) for key, value in ({**dict(composition.flatten(document)), **own}).items()}
    changes = [
        f"{key}={_short(value)}"
        for key, value in actual.items()
        if _concerns(kind, key) and key in usual and value != _plain(usual[key])
    ]
    return name, changes


def _source_overrides(document: JsonObject) -> list[str]:
    """Overrides for the source of the images, which some presets require."""
    download = document["download"]
    values = {"download.path": download["path"], "download.hub.repo": download["hub"]["repo"]}
    return [f"{key}={value}" for key, value in values.items() if value]


def _concerns(kind: str, key: str) -> bool:
    """Whether a parameter can affect a run of this kind."""
    section = key.split(".")[0]
    if key in LOCAL or section == "preset":
        return False
    return section in OF_EVALUATION if kind == "evaluation" else section not in AFTER_TRAINING


def _plain(value: object) -> object:
    """A value as in JSON; lists are stored as text in the parameters of a run."""
    if isinstance(value, str) and value.startswith("["):
        try:
            parsed: object = json.loads(value)
        except ValueError:
            return value
        return parsed
    return list(value) if isinstance(value, tuple) else value


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"').replace(" ", "")


def training_metrics(values: Mapping[str, float]) -> dict[str, float]:
    """Rename values of the training history for MLflow: `train/loss`, `train/held_out_loss_std-0.10`."""
    return {f"train/{name.replace('/', '_')}": value for name, value in values.items()}


def evaluation_metrics(measured: Measurements) -> dict[str, float]:
    """Return every number of an evaluation under its name in MLflow: `eval/frechet_distance_unguided`."""
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
