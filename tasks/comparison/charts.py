"""Curves of several runs in one chart, and the values of a sweep with their spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tasks.report.plotting import COLOURS, DASHES, SERIES, Chart, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tasks.comparison.subject import Curve
    from tasks.sweeps.leaderboard import Row

PANELS = {"train/loss": "training loss", "train/held_out_loss": "held-out loss", "train/learning_rate": "learning rate"}
"""Curves that are drawn, as far as a run has them."""
SMOOTHED = "train/loss"
MOST = len(SERIES) * len(DASHES)
"""Most curves that can be distinguished by colour and dashes."""


def curves(runs: Mapping[str, Mapping[str, Curve]]) -> Chart | None:
    """Draw the curves of all runs over each other, one panel for each kind; None without curves.

    runs: name -> curves under their names in MLflow. The training loss is a running mean over a twentieth of the run.
    """
    shown = dict(list(runs.items())[:MOST])
    present = [name for name in PANELS if any(name in found for found in shown.values())]
    if not present:
        return None
    panels = [_panel(name, shown, legend=name == present[0]) for name in present]
    return render(panels, widths=[4.6 if name == present[0] else 3.5 for name in present], salt="compare")


def _panel(name: str, runs: Mapping[str, Mapping[str, Curve]], legend: bool) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        axes.set_title(PANELS[name], loc="left")
        axes.set_xlabel("step")
        for number, (run, found) in enumerate(runs.items()):
            if curve := found.get(name):
                values = [value for _, value in curve]
                if name == SMOOTHED:
                    values = _running_mean(values, max(1, len(values) // 20))
                _draw(axes, [step for step, _ in curve], values, number, run)
        if "loss" in name:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if legend:
            axes.legend(loc="upper right")

    return draw


def _draw(axes: Axes, steps: Sequence[int], values: Sequence[float], number: int, label: str) -> None:
    # Runs from one training have the same curves: with dashes, all of them can be seen.
    colour = COLOURS[SERIES[number % len(SERIES)]]
    dashes = DASHES[(number + number // len(SERIES)) % len(DASHES)]
    marker = "o" if len(values) == 1 else ""
    axes.plot(steps, values, label=label, color=colour, linestyle=dashes, linewidth=1.8, marker=marker)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    return [
        sum(window) / len(window) for end in range(1, len(values) + 1) if (window := values[max(0, end - width) : end])
    ]


def sweep(rows: Sequence[Row], values: Mapping[str, Sequence[float]], metric: str) -> Chart:
    """Draw mean and standard deviation of `metric` for each row of a leaderboard, and every seed as a point.

    rows: in the order of the axis. values: case -> one value for each seed.
    """

    def draw(axes: Axes) -> None:
        axes.set_title(f"{metric.replace('_', ' ')}, mean ± standard deviation over the seeds", loc="left")
        axes.set_xlabel("")
        for number, row in enumerate(rows):
            sample = row.samples[metric]
            axes.plot([number] * len(values[row.case]), values[row.case], "o", color=COLOURS["series-2"], markersize=4)
            axes.errorbar(
                number + 0.12,
                sample.mean,
                yerr=sample.spread or 0.0,
                color=COLOURS["series-1"],
                marker="s",
                markersize=5,
                capsize=4,
                linewidth=1.8,
            )
        axes.set_xticks(range(len(rows)), [row.case.replace(", ", "\n") for row in rows])
        axes.set_xlim(-0.5, len(rows) - 0.5)
        axes.set_ylim(bottom=0)

    return render([draw], widths=[max(5.5, 1.6 * len(rows))], salt="sweep")
