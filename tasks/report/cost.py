"""Quality against cost: distance by network evaluations and by seconds with the Pareto front, measures by guidance."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tasks.report import tables
from tasks.report.page import Figure
from tasks.report.plotting import COLOURS, DASHES, SERIES, Chart, line, render, title_axes
from tasks.runtime.measures import draw_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
EVALUATIONS = {"heun": 2}
"""Network evaluations for each step, where it is not one."""
SWEPT = (("clip_score",), ("label_accuracy",), ("precision", "recall"))
"""Measures by guidance scale that share a chart, after the distance."""
SECONDS = "seconds per image"
COST_TEXT = (
    "Distance of unguided samples against the network evaluations for one image: one for each step, two for a step of "
    "Heun but the last. The number beside a point is its number of steps. No sampler is both cheaper and closer than "
    "those on the Pareto front. Guidance doubles the cost."
)
SECONDS_TEXT = (
    "Seconds per image depend on the machine, so their chart is not part of this page; it is "
    "reports/timing/figures/quality_by_seconds.png."
)
GUIDANCE_TEXT = (
    "More guidance gives samples that fit their label or prompt better and look more typical (precision), and that "
    "cover less of the variety of real images (recall). One seed block; w = 1 is no guidance."
)


@dataclass(frozen=True)
class Point:
    """One way to draw samples, and the distance of these samples."""

    sampler: str
    steps: int
    distance: float
    weights: str = ""
    """"teacher" for the weights before consistency tuning."""
    eta: float = 0.0

    @property
    def name(self) -> str:
        """Name of the line that it belongs to."""
        eta = f", η = {self.eta:g}" if self.eta else ""
        return tables.SAMPLERS[self.sampler] + eta + (f" ({self.weights})" if self.weights else "")

    @property
    def evaluations(self) -> int:
        """Network evaluations per image without guidance; Heun's last step needs one."""
        return EVALUATIONS.get(self.sampler, 1) * self.steps - (self.sampler == "heun")


def points(evaluation: Path, distance: str) -> list[Point]:
    """Read the unguided rows of `samplers.csv` that are comparable: over equally many images and seed blocks.

    Of several such groups the one with the most rows.
    """
    with (evaluation / "samplers.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row[distance] and float(row["guidance_scale"]) == 1]
    if not rows:
        return []
    group, _ = Counter((row["n"], row["seed_blocks"]) for row in rows).most_common(1)[0]
    return [
        Point(row["sampler"], int(row["steps"]), float(row[distance]), row.get("weights") or "", float(row["eta"] or 0))
        for row in rows
        if (row["n"], row["seed_blocks"]) == group
    ]


def pareto(costs: Sequence[float], distances: Sequence[float]) -> list[int]:
    """Return the indices of the points on the Pareto front, by increasing cost: none is both cheaper and closer."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], distances[i])):
        if not front or distances[index] < distances[front[-1]]:
            front.append(index)
    return front


def chart(found: Sequence[Point], costs: Sequence[float], distance: str, cost: str, salt: str) -> Chart:
    """Draw the points over their costs, with a line for each sampler and the Pareto front as steps."""

    def draw(axes: Axes) -> None:
        title_axes(axes, distance, cost)
        front = pareto(costs, [point.distance for point in found])
        x = [*(costs[i] for i in front), 1.2 * max(costs)]
        y = [*(found[i].distance for i in front), found[front[-1]].distance]
        axes.step(x, y, where="post", color=COLOURS["muted"], linestyle=DASHES[1], linewidth=1.2, label="Pareto front")
        for number, name in enumerate(dict.fromkeys(point.name for point in found)):
            own = sorted((costs[i], point.distance, point.steps) for i, point in enumerate(found) if point.name == name)
            series, marker = number % len(SERIES), MARKERS[number % len(MARKERS)]
            line(axes, [c for c, _, _ in own], [d for _, d, _ in own], series, name, bold=True, marker=marker)
            for at, height, steps in own:
                axes.annotate(f"{steps}", (at, height), (5, 5), textcoords="offset points", fontsize=8.5)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.margins(x=0.12, y=0.2)
        axes.legend(loc="best")

    return render([draw], widths=(5.6,), salt=salt)


def by_steps(evaluation: Path, distance: str) -> Figure:
    """Return the chart of distance by network evaluations; a sentence if fewer than two samplers are comparable."""
    found, title = points(evaluation, distance), "Quality against cost"
    if len(found) < 2:
        return Figure(title, ["It needs two samplers whose distances were measured over equally many images."])
    name = tables.MEASURES[distance][0]
    text = [COST_TEXT, SECONDS_TEXT]
    drawn = chart(found, [float(point.evaluations) for point in found], name, "network evaluations per image", "cost")
    return Figure(title, text, label=f"{name} against network evaluations, a line for each sampler", chart=drawn)


def by_seconds(evaluation: Path, timing: Path, distance: str) -> bytes | None:
    """Return a PNG of distance by measured seconds per image; None if fewer than two samplers were timed."""
    seconds = json.loads(timing.read_text(encoding="utf-8")).get("seconds_per_image", {}) if timing.exists() else {}
    timed = [
        (point, seconds[name])
        for point in points(evaluation, distance)
        if (name := draw_name(point.sampler, point.steps, 1.0, point.eta)) in seconds and not point.weights
    ]
    if len(timed) < 2:
        return None
    title = tables.MEASURES[distance][0]
    return chart([p for p, _ in timed], [float(s) for _, s in timed], title, SECONDS, "seconds").png


def by_guidance(evaluation: Path, distance: str) -> Figure:
    """Return the charts of distance, agreement, precision and recall by guidance scale."""
    heading, file = "Measures by guidance scale", evaluation / "guidance.csv"
    rows: list[dict[str, str]] = []
    if file.exists():
        with file.open(encoding="utf-8", newline="") as table:
            rows = list(csv.DictReader(table))
    scales = {row["guidance_scale"] for row in rows}
    several = len({row["guidance"] for row in rows if row.get("guidance")}) > 1
    if len(scales) < 2:
        return Figure(heading, ["It needs two scales in evaluate.guidance_sweep, and a model with guidance."])
    panels: list[Callable[[Axes], None]] = []
    for measures in ((distance,), *SWEPT):
        curves = {}
        for measure in measures:
            for kind, curve in _curves(rows, measure).items():
                names = [tables.MEASURES[measure][0]] * (len(measures) > 1) + [tables.GUIDANCES[kind]] * several
                curves[", ".join(names)] = curve
        if any(len(curve) > 1 for curve in curves.values()):
            first, *others = (tables.MEASURES[measure][0] for measure in measures)
            title = " and ".join([first, *map(str.lower, others)])
            panels.append(_panel(title + (", %" if measures[0] in tables.SHARES else ""), curves))
    label = "Line charts over the guidance scale: distance, agreement with the condition, precision and recall"
    widths = [5.2 if len(panels) % 2 == 0 else 3.5] * len(panels)
    drawn = render(panels, widths, "by-guidance", rows=1 + (len(panels) == 4))
    return Figure(heading, [GUIDANCE_TEXT], label=label, chart=drawn)


def _curves(rows: Sequence[Mapping[str, str]], measure: str) -> dict[str, list[tuple[float, float]]]:
    """Return (scale, value) points by kind of guidance; scale 1, which is no guidance, belongs to every kind."""
    unit = 100 if measure in tables.SHARES else 1
    kinds = list(dict.fromkeys(row["guidance"] for row in rows if row.get("guidance"))) or ["classifier_free"]
    return {
        kind: sorted(
            (float(row["guidance_scale"]), unit * float(row[measure]))
            for row in rows
            if row.get("guidance") in (None, "", kind) and row.get(measure)
        )
        for kind in kinds
    }


def _panel(title: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        title_axes(axes, title, "guidance scale w")
        for series, (name, curve) in enumerate(curves.items()):
            x, y = [scale for scale, _ in curve], [value for _, value in curve]
            line(axes, x, y, series, name or None, bold=True, marker=MARKERS[series])
        if len(curves) > 1:
            axes.legend(loc="best")

    return draw
