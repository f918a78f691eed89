"""Line charts of the report, as a PNG without metadata and as inline SVGs that follow the page's theme."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from models.noise.paths import DiffusionPath
from models.noise.schedules import log_snr

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from models.noise.paths import Path as NoisePath
    from models.noise.schedules import Array

Values: TypeAlias = "Sequence[float] | np.ndarray | pd.Series"

# The light theme's colours; the SVG refers to the CSS variables of these names instead.
COLOURS = {
    "ink": "#1c2127",
    "muted": "#68707b",
    "line": "#d9dde3",
    "series-1": "#0b7285",
    "series-2": "#c2410c",
    "series-3": "#7048b6",
    "series-4": "#4d7c0f",
    "series-5": "#a3195b",
}
SERIES = ("series-1", "series-2", "series-3", "series-4", "series-5")
DASHES = ("solid", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 1.6, 1.2, 1.6)), (0, (3, 1, 1.2, 1, 1.2, 1)))
FONT = "DejaVu Sans"  # comes with matplotlib, so the same glyphs everywhere
PNG_DPI = 144
HEIGHT = 3.2
"""Inches."""


@dataclass(frozen=True)
class Chart:
    """One chart in two file formats."""

    png: bytes
    svg: str
    """One `<svg>` element for each panel, so that a narrow page can stack them. Colours are the page's CSS variables,
    text is drawn as outlines."""


def path_curves(path: NoisePath) -> dict[str, Array]:
    """Return `signal` (its share of the variance) and `log_snr` by timestep, and for a diffusion path `beta`.

    Each is float64 [T]. A rectified flow, which has no betas, is taken at t = 1..T.
    """
    if isinstance(path, DiffusionPath):
        levels = np.asarray(path.alpha_bar)
        beta = 1 - levels / np.concatenate([[1.0], levels[:-1]])
        return {"beta": beta, "signal": levels, "log_snr": log_snr(levels)}
    flow = [path.level(t) for t in range(1, path.timesteps + 1)]
    return {
        "signal": np.array([level.signal for level in flow]),
        "log_snr": np.array([level.log_snr for level in flow]),
    }


def schedules(curves: dict[str, dict[str, Array]], own: str) -> Chart:
    """Draw beta, the signal's share and log-SNR of each path over the timestep; the model's `own` is emphasised.

    curves: schedule -> result of `path_curves`.
    """
    panels = (
        ("beta", r"noise added per step, $\beta_t$"),
        ("signal", r"signal left, $\alpha_t^2/(\alpha_t^2+\sigma_t^2)$"),
        ("log_snr", r"log signal-to-noise, $\log\,\alpha_t^2/\sigma_t^2$"),
    )

    ordered = sorted(curves, key=lambda name: name != own)

    def panel(quantity: str, title: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            _title(axes, title, "timestep t")
            for series, name in enumerate(ordered):
                label = f"{name} (this model)" if name == own else name
                if quantity in curves[name]:
                    values = curves[name][quantity]
                    _line(axes, range(len(values)), values, series, label, bold=name == own)
            if quantity == "beta":
                axes.set_yscale("log")
            if quantity == "signal":
                axes.legend(loc="best")

        return draw

    return render([panel(*which) for which in panels], widths=(3.5, 3.5, 3.5), salt="schedules")


def training(history: pd.DataFrame) -> Chart:
    """Draw the losses (logarithmic) and the learning rate over the training step.

    history: columns `step`, `loss`, `learning_rate` and, if it was measured, `held_out_loss` (NaN between
    measurements). The training loss is shown with its running mean over a twentieth of the run.
    """

    def draw_losses(losses: Axes) -> None:
        _title(losses, "loss", "step")
        logged = history.dropna(subset=["loss"])
        losses.plot(logged["step"], logged["loss"], color=COLOURS["series-1"], alpha=0.3, linewidth=1)
        smooth = logged["loss"].rolling(max(1, len(logged) // 20), min_periods=1).mean()
        _line(losses, logged["step"], smooth, 0, "training, running mean", bold=True)
        if "held_out_loss" in history and history["held_out_loss"].notna().any():
            measured = history.dropna(subset=["held_out_loss"])
            _line(losses, measured["step"], measured["held_out_loss"], 1, "held-out", bold=True, marker="o")
        losses.set_yscale("log")
        losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        losses.yaxis.set_minor_formatter(NullFormatter())
        losses.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        losses.legend(loc="upper right")

    def draw_rate(rate: Axes) -> None:
        _title(rate, "learning rate", "step")
        timed = history.dropna(subset=["learning_rate"])
        _line(rate, timed["step"], timed["learning_rate"], 0, None, bold=True)
        rate.set_ylim(bottom=0)
        rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    return render([draw_losses, draw_rate], widths=(6.5, 3.9), salt="training")


def guidance(curves: Mapping[str, Sequence[tuple[float, float, float]]], distance: str, x_label: str) -> Chart:
    """Draw the curves of a guidance sweep, one for each kind of guidance.

    curves: name of the kind -> (x, distance, guidance scale) points; x is the CLIP score or the accuracy, or for an
    unconditional model the scale. `distance` and `x_label` are the titles of the two measures.
    """

    def draw(axes: Axes) -> None:
        _title(axes, distance, x_label)
        for series, (name, points) in enumerate(curves.items()):
            x, y = [point[0] for point in points], [point[1] for point in points]
            _line(axes, x, y, series, name, bold=True, marker="o")
            for agreed, height, scale in points:
                axes.annotate(f"w = {scale:g}", (agreed, height), (5, 5), textcoords="offset points", fontsize=8.5)
        axes.margins(x=0.12, y=0.18)
        if len(curves) > 1:
            axes.legend(loc="best")

    return render([draw], widths=(7.2,), salt="guidance")


def widths(rows: Sequence[tuple[float, float, float]], distance: str, floor: float) -> Chart:
    """Draw distance and held-out loss over the width of an average, from (width, distance, held-out loss) rows.

    `distance` is the title of the measure; its `floor` is a horizontal line.
    """
    x = [row[0] for row in rows]

    def draw_distance(axes: Axes) -> None:
        _title(axes, distance, "relative width of the average")
        _line(axes, x, [row[1] for row in rows], 0, None, bold=True, marker="o")
        axes.axhline(floor, color=COLOURS["muted"], linewidth=1, linestyle=DASHES[1])
        axes.annotate("floor", (x[-1], floor), (0, 4), textcoords="offset points", fontsize=8.5, ha="right")

    def draw_loss(axes: Axes) -> None:
        _title(axes, "held-out loss", "relative width of the average")
        _line(axes, x, [row[2] for row in rows], 1, None, bold=True, marker="o")

    return render([draw_distance, draw_loss], widths=(5.2, 5.2), salt="widths")


def few_steps(lines: Mapping[str, Sequence[tuple[int, float]]], distance: str) -> Chart:
    """Draw a line through the (sampling steps, distance) points of each model, by its name."""

    def draw(axes: Axes) -> None:
        _title(axes, distance, "sampling steps")
        for series, (name, points) in enumerate(lines.items()):
            _line(axes, [steps for steps, _ in points], [value for _, value in points], series, name, True, marker="o")
        axes.set_xscale("log")
        shown = sorted({steps for points in lines.values() for steps, _ in points})
        axes.set_xticks(shown, [str(steps) for steps in shown])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper right")

    return render([draw], widths=(7.2,), salt="few-steps")


def strengths(x: Sequence[float], panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Chart:
    """Draw the panels, title -> name of a line -> values, over the strength of image-to-image."""

    def panel(title: str, lines: Mapping[str, Sequence[float]]) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            _title(axes, title, "strength")
            for series, (name, values) in enumerate(lines.items()):
                _line(axes, x, values, series, name or None, bold=True, marker="o")
            axes.set_ylim(bottom=0)
            if len(lines) > 1:
                axes.legend(loc="best")

        return draw

    drawn = [panel(title, lines) for title, lines in panels.items()]
    return render(drawn, widths=[3.5] * len(drawn), salt="strengths")


def _title(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel(x_label)


def _line(axes: Axes, x: Values, y: Values, series: int, label: str | None, bold: bool, marker: str = "") -> None:
    axes.plot(
        x,
        y,
        label=label,
        color=COLOURS[SERIES[series]],
        linestyle=DASHES[0 if marker else series],
        linewidth=2.2 if bold else 1.4,
        marker=marker,
        markersize=4,
        zorder=3 if bold else 2,
    )


def render(panels: Sequence[Callable[[Axes], None]], widths: Sequence[float], salt: str) -> Chart:
    """Draw panels of `widths` inches as one PNG, and each as an SVG; `salt` makes the ids in the SVGs unique."""
    png, elements = io.BytesIO(), []
    with _style(salt):
        figure = Figure(figsize=(sum(widths), HEIGHT), layout="constrained")
        axes = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
        for draw, panel in zip(panels, axes, strict=True):
            draw(panel)
        figure.savefig(png, format="png", dpi=PNG_DPI, metadata={"Software": None})
    for number, (draw, width) in enumerate(zip(panels, widths, strict=True)):
        with _style(f"{salt}{number}"):
            figure, svg = Figure(figsize=(width, HEIGHT), layout="constrained"), io.StringIO()
            draw(figure.subplots())
            figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Type": None})
        elements.append(_inline(svg.getvalue(), f"{salt}{number}", width))
    return Chart(png.getvalue(), "\n".join(elements))


@contextmanager
def _style(salt: str) -> Iterator[None]:
    settings = {
        "svg.hashsalt": salt,
        "svg.fonttype": "path",
        "font.family": FONT,
        "font.size": 9,
        "mathtext.fontset": "dejavusans",
        "text.color": COLOURS["ink"],
        "axes.edgecolor": COLOURS["line"],
        "axes.labelcolor": COLOURS["muted"],
        "axes.titlecolor": COLOURS["ink"],
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": COLOURS["line"],
        "grid.linewidth": 0.6,
        "xtick.color": COLOURS["muted"],
        "ytick.color": COLOURS["muted"],
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "path.simplify": True,
    }
    with mpl.rc_context({**mpl.rcParamsDefault, **settings, "backend": "agg"}):
        yield


def _inline(document: str, prefix: str, width: float) -> str:
    """Turn a matplotlib SVG file into an element for an HTML page with the page's colours.

    `width` is its share of a row.
    """
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<(metadata|style).*?</\1>\s*", "", svg, flags=re.DOTALL)
    # Groups and glyphs have the same ids in every file, but an id must be unique in a page.
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)
    svg = re.sub(r'( id="|"#|url\(#)', rf"\1{prefix}-", svg)
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        rf'<svg viewBox="\1" style="--share: {width:g}" aria-hidden="true">',
        svg,
        count=1,
    )
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.strip()
