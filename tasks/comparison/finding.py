"""What a sweep has shown: its table, its figure and two sentences, from the runs in MLflow."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

from tasks.comparison import charts
from tasks.runtime import tracking
from tasks.runtime.markdown import code, escaped
from tasks.sweeps import leaderboard, plan, records, significance
from tasks.sweeps.leaderboard import Board, Row
from tasks.sweeps.spec import Spec, direction

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


@dataclass(frozen=True)
class Finding:
    """The result of one sweep."""

    name: str
    spec: Spec
    board: Board
    values: dict[str, list[float]]
    """Case -> the ranking metric for each seed."""
    commit: str
    """Git commit that ran the trials; empty outside a Git repository."""

    @property
    def metric(self) -> str:
        """The metric that ranks."""
        return self.board.metrics[0]


def read(client: MlflowClient, name: str) -> Finding | None:
    """Read the sweep `name`, run without overrides on the command line; None if it has no leaderboard."""
    filters = f"tags.`{records.NAME}` = '{name}' and tags.`{tracking.KIND}` = '{records.SWEEP}'"
    found = client.search_runs([tracking.experiment_id(client)], filters, max_results=1)
    if not found:
        return None
    run = found[0]
    try:
        board = Board.from_json(records.leaderboard(client, run.info.run_id))
    except MlflowException:  # interrupted before the first leaderboard
        return None
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(client.download_artifacts(run.info.run_id, "sweep.json", scratch))
        document = json.loads(path.read_text(encoding="utf-8"))
    document.pop("command_line_overrides")
    values = {row.case: _values(client, row, board.metrics[0]) for row in board.rows}
    return Finding(name, Spec.model_validate(document), board, values, run.data.tags.get(MLFLOW_GIT_COMMIT, ""))


def _values(client: MlflowClient, row: Row, metric: str) -> list[float]:
    results = [records.result(client, run).metrics for _, run in sorted(row.runs.items())]
    return [metrics[metric] for metrics in results if metric in metrics]


def sentences(found: Finding) -> str:
    """Return the finding in two sentences, or why there is none."""
    board = found.board
    if board.refusal:
        return board.refusal
    if not board.rows:
        return "No trial has a result."
    best, *others = board.rows
    name, seeds = found.metric.replace("_", " "), len(best.runs)
    extreme = "lowest" if direction(found.metric) == "minimize" else "highest"
    over = f"{best.case}, {seeds} {'seeds' if seeds > 1 else 'seed'}"
    return f"The {extreme} mean {name} is {_number(best, found)} ({over}). {_comparison(best, others, found)}"


def _comparison(best: Row, others: Sequence[Row], found: Finding) -> str:
    worse: list[Row] = []
    equal: list[Row] = []
    for row in others:
        differs = significance.differ(row.samples[found.metric], best.samples[found.metric])
        if differs is None:
            return "With a single seed there is no spread, so nothing can be said about differences."
        (worse if differs else equal).append(row)
    if not others:
        return "There is nothing to compare it with."
    if not worse:
        return f"There is no difference beyond the spread between seeds: {_listed(equal, found)}."
    text = f"Worse by more than the spread between seeds: {_listed(worse, found)}"
    return f"{text}; no difference beyond it: {_listed(equal, found)}." if equal else f"{text}."


def _listed(rows: Sequence[Row], found: Finding) -> str:
    return ", ".join(f"{row.case} ({_number(row, found)})" for row in rows)


def _number(row: Row, found: Finding) -> str:
    return leaderboard.number(row.samples[found.metric])


def figure(found: Finding) -> bytes:
    """Return the figure as PNG: every seed, mean and standard deviation, in the order of the sweep file."""
    rows = {row.case: row for row in found.board.rows if found.metric in row.samples}
    order = [case for case in cases(found.spec) if case in rows] or list(rows)
    return charts.sweep([rows[case] for case in order], found.values, found.metric).png


def cases(spec: Spec) -> list[str]:
    """Return the combinations of a sweep in words, in the order of its file; empty for a search."""
    return list(dict.fromkeys(plan.words({**point, **variant}) for point, variant in plan.settings(spec)))


def page(found: Finding) -> str:
    """Return the page as Markdown."""
    fixed = ", ".join(code(f"{key}={plan.text(value)}") for key, value in found.spec.overrides.items())
    seeds = ", ".join(map(str, found.spec.seeds))
    lines = [
        f"# {escaped(found.spec.title)}",
        "",
        escaped(found.spec.question),
        "",
        f"**Finding.** {escaped(sentences(found))}",
        "",
        f"![{escaped(found.metric)} of each combination, with every seed as a point]({found.name}.png)",
        "",
        leaderboard.markdown(found.board).rstrip(),
        "",
        "## How it was measured",
        "",
        f"Preset {code(found.spec.preset)} with {fixed or 'no other parameters'}; training seeds {seeds}.",
        "",
        "```bash",
        f"python -m flows.sweep {found.name}",
        "```",
        "",
        f"At commit {code(found.commit or 'unknown')}. `python -m tasks.findings {found.name}` wrote this page.",
    ]
    return "\n".join(lines) + "\n"
