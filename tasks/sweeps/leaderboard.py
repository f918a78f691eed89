"""The leaderboard of a sweep: one row per combination of parameters, over its training seeds, best first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tasks.runtime.markdown import escaped
from tasks.sweeps import significance
from tasks.sweeps.significance import Sample
from tasks.sweeps.spec import direction

if TYPE_CHECKING:
    from models.json_files import JsonObject
    from tasks.sweeps.records import Result

FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One combination of parameters."""

    case: str
    samples: dict[str, Sample]
    """Metric -> its values over the seeds; metrics that were not taken are absent."""
    runs: dict[int, str]
    """Seed -> MLflow run."""
    seconds: float
    """Of the runs together, on the machine that computed them."""
    verdict: str
    """The comparison with the first row, in words."""


@dataclass(frozen=True)
class Board:
    """The leaderboard."""

    metrics: list[str]
    rows: list[Row]
    fingerprint: str
    missing: list[str]
    """Labels of the evaluations without a result."""
    refusal: str = ""
    """Why the results are not ranked, in one sentence; empty if they are."""

    def to_json(self) -> JsonObject:
        """Return the content of `leaderboard.json`."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, values: JsonObject) -> Board:
        """Build the leaderboard; the inverse of `to_json`."""
        rows = [
            Row(
                row["case"],
                {name: Sample(**sample) for name, sample in row["samples"].items()},
                {int(seed): run for seed, run in row["runs"].items()},
                row["seconds"],
                row["verdict"],
            )
            for row in values["rows"]
        ]
        return cls(values["metrics"], rows, values["fingerprint"], values["missing"], values["refusal"])


def board(results: Sequence[Result], metrics: Sequence[str], cases: Sequence[str], missing: Sequence[str]) -> Board:
    """Rank results by the first of `metrics`.

    Numbers with different fingerprints are not ranked: their rows stay in the order of `cases`, and `refusal` gives the
    reason.
    """
    rows = [_row(case, [result for result in results if result.case == case], metrics) for case in cases]
    rows = [row for row in rows if row.runs]
    fingerprints = sorted({result.fingerprint for result in results})
    if len(fingerprints) > 1:
        prints = " and ".join(fingerprint[:12] for fingerprint in fingerprints)
        refusal = (
            f"The results are not ranked, because they were measured in different ways (fingerprints {prints}); vary "
            "no parameter of the data, the judge or the number of samples."
        )
        return Board(list(metrics), rows, "", list(missing), refusal)
    first = metrics[0]
    ranked = [row for row in rows if first in row.samples]
    ranked.sort(key=lambda row: row.samples[first].mean, reverse=direction(first) == "maximize")
    judged = [_judged(row, ranked[0], first) for row in ranked]
    unmeasured = [row for row in rows if first not in row.samples]
    refusal = f"{first} was not measured for: {'; '.join(row.case for row in unmeasured)}." if unmeasured else ""
    return Board(list(metrics), [*judged, *unmeasured], next(iter(fingerprints), ""), list(missing), refusal)


def _row(case: str, results: Sequence[Result], metrics: Sequence[str]) -> Row:
    samples = {}
    for metric in metrics:
        values = [result.metrics[metric] for result in results if metric in result.metrics]
        if values and len(values) == len(results):
            samples[metric] = Sample.of(values)
    return Row(
        case, samples, {result.seed: result.run_id for result in results}, sum(result.seconds for result in results), ""
    )


def _judged(row: Row, best: Row, metric: str) -> Row:
    return Row(row.case, row.samples, row.runs, row.seconds, verdict(row, best, metric))


def verdict(row: Row, best: Row, metric: str) -> str:
    """Compare a row with the best one, in words."""
    if row.case == best.case:
        return "best mean"
    differ = significance.differ(row.samples[metric], best.samples[metric])
    if differ is None:
        return "one seed: cannot be decided"
    return "worse by more than the spread" if differ else "no difference beyond the spread"


def number(sample: Sample | None) -> str:
    """Return, for example, "0.712 ± 0.034"; empty without a value."""
    if sample is None:
        return ""
    return f"{sample.mean:.3g}" + ("" if sample.spread is None else f" ± {sample.spread:.2g}")


def table(board: Board) -> list[dict[str, str]]:
    """Return the rows as text, by column."""
    return [
        {
            "case": row.case,
            **{metric: number(row.samples.get(metric)) for metric in board.metrics},
            "seeds": str(len(row.runs)),
            "seconds": f"{row.seconds:.0f}",
            "compared with the best": row.verdict,
        }
        for row in board.rows
    ]


def markdown(board: Board) -> str:
    """Return the leaderboard as Markdown."""
    lines = [board.refusal, ""] if board.refusal else []
    if rows := table(board):
        lines += [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
        lines += [f"| {' | '.join(escaped(cell) or '–' for cell in row.values())} |" for row in rows]
    if board.missing:
        lines += ["", "Without a result: " + "; ".join(escaped(label) for label in board.missing) + "."]
    lines += ["", f"Mean ± standard deviation over the training seeds. {significance.RULE}"]
    if board.fingerprint:
        lines += ["", f"Fingerprint `{board.fingerprint[:12]}`."]
    return "\n".join(lines) + "\n"
