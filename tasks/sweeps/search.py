"""A search with Optuna: its study in a file, the TPE sampler, and a pruner that decides after each training seed.

The study continues after an interruption: points that a killed process left unfinished are tried again. Seeds that
MLflow has are not trained again (`tasks/sweeps/identity.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.sweeps.spec import direction

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import Trial as OptunaTrial

    from tasks.sweeps.plan import Settings
    from tasks.sweeps.spec import Interval, Spec, Value

POINT, INTERRUPTED = "point", "interrupted"
"""Attributes of a trial of Optuna: the settings as JSON, and whether a killed process left it."""
DIGITS = 4
"""Significant digits of a searched number."""


@dataclass(frozen=True)
class Point:
    """Settings that Optuna proposed."""

    settings: Settings
    trial: OptunaTrial


def open_study(path: Path, spec: Spec, overrides: Sequence[str]) -> Study:
    """Open or create the study in the file `path`; another search or base preset has another study there."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    assert spec.search is not None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = [spec.model_dump(mode="json", include={"preset", "overrides", "search", "seeds", "metrics"}), *overrides]
    name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    search = spec.search
    pruner = (
        optuna.pruners.MedianPruner(n_startup_trials=search.startup) if search.prune else optuna.pruners.NopPruner()
    )
    study = optuna.create_study(
        study_name=name,
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(path))),
        pruner=pruner,
        direction=direction(spec.metrics[0]),
        load_if_exists=True,
    )
    # A sampler that starts again with the same seed would propose the first points a second time.
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=search.startup, seed=search.seed + len(study.trials))
    _try_again(study)
    return study


def _try_again(study: Study) -> None:
    """Enqueue the points of trials that a killed process left running. The caller has the lock of the sweep."""
    from optuna.trial import TrialState

    for left in study.get_trials(states=(TrialState.RUNNING,)):
        study.set_user_attr(f"{INTERRUPTED}-{left.number}", True)
        study.tell(left.number, state=TrialState.FAIL)
        if left.params:
            study.enqueue_trial(left.params)


def done(study: Study) -> int:
    """Number of points that were tried to their end, pruned or failed."""
    from optuna.trial import TrialState

    ended = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    return sum(f"{INTERRUPTED}-{trial.number}" not in study.user_attrs for trial in study.get_trials(states=ended))


def ask(study: Study, spec: Spec) -> Point:
    """Return the next settings to try."""
    assert spec.search is not None
    trial = study.ask()
    settings = {key: _suggest(trial, key, values) for key, values in spec.search.parameters.items()}
    trial.set_user_attr(POINT, json.dumps(settings))
    return Point(settings, trial)


def _suggest(trial: OptunaTrial, key: str, values: Interval | list[Value]) -> Value:
    if isinstance(values, list):
        index: int = trial.suggest_categorical(key, list(range(len(values))))
        return values[index]
    if values.integer:
        return int(trial.suggest_int(key, round(values.low), round(values.high), log=values.log))
    return float(f"{trial.suggest_float(key, values.low, values.high, log=values.log):.{DIGITS}g}")


def report(study: Study, point: Point, mean: float, seeds: int, last: bool) -> bool:
    """Record the mean over the first `seeds` training seeds; returns whether the point is finished.

    A point that is worse than the median of the others after as many seeds is pruned.
    """
    from optuna.trial import TrialState

    point.trial.report(mean, step=seeds)
    if last:
        study.tell(point.trial, mean)
        return True
    if point.trial.should_prune():
        study.tell(point.trial, state=TrialState.PRUNED)
        return True
    return False


def fail(study: Study, point: Point) -> None:
    """Record that a point has no result."""
    from optuna.trial import TrialState

    study.tell(point.trial, state=TrialState.FAIL)


def points(study: Study) -> list[tuple[Settings, bool]]:
    """Return the settings of every point, and whether all of its seeds are wanted, which a pruned one lacks."""
    from optuna.trial import TrialState

    return [
        (json.loads(trial.user_attrs[POINT]), trial.state != TrialState.PRUNED)
        for trial in study.get_trials(deepcopy=False)
        if f"{INTERRUPTED}-{trial.number}" not in study.user_attrs and POINT in trial.user_attrs
    ]
