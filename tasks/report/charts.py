"""Line charts for the report: one drawing, as PNG with fixed metadata and as SVG that follows the page's theme."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from models.schedules import Array

# Drawn with the light theme's colours; in the SVG each becomes the CSS variable of that name.
COLOURS = {
    "ink": "#1c2127",
    "muted": "#68707b",
    "line": "#d9dde3",
    "series-1": "#0b7285",
    "series-2": "#c2410c",
    "series-3": "#7048b6",
    "series-4": "#4d7c0f",
}
SERIES = ("series-1", "series-2", "series-3", "series-4")
DASHES = ("solid", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 1.6, 1.2, 1.6)))
FONT = "DejaVu Sans"  # comes with matplotlib, so the same glyphs everywhere
PNG_DPI = 144


@dataclass(frozen=True)
class Chart:
    """One drawing in two forms."""

    png: bytes
    svg: str
    """An `<svg>` element for inlining; its colours are the page's CSS variables, its letters are outlines."""


def schedules(curves: dict[str, dict[str, Array]], own: str) -> Chart:
    """Three panels over t / T: beta, alpha_bar and log-SNR of each schedule, the model's `own` emphasised.

    curves: schedule -> {"beta", "alpha_bar", "log_snr"} -> float64 [T].
    """
    panels = (
        ("beta", r"noise added per step, $\beta_t$"),
        ("alpha_bar", r"signal left, $\bar{\alpha}_t$"),
        ("log_snr", r"log signal-to-noise, $\log\,\bar{\alpha}_t/(1-\bar{\alpha}_t)$"),
    )

    ordered = sorted(curves, key=lambda name: name != own)

    def draw(figure: Figure) -> None:
        for axes, (quantity, title) in zip(figure.subplots(1, 3), panels, strict=True):
            _title(axes, title, "timestep t")
            for series, name in enumerate(ordered):
                label = f"{name} (this model)" if name == own else name
                _line(axes, range(len(curves[name][quantity])), curves[name][quantity], series, label, bold=name == own)
        figure.axes[0].set_yscale("log")
        figure.axes[1].legend(loc="best")

    return _render(draw, size=(10.4, 3.2), salt="schedules")


def training(history: pd.DataFrame) -> Chart:
    """Two panels over the optimiser's steps: losses (logarithmic), and the learning rate.

    history: columns `step`, `loss`, `learning_rate` and, where it was measured, `held_out_loss` (NaN
    between measurements). The training loss is also shown as its running mean over a twentieth of the run.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    def draw(figure: Figure) -> None:
        losses, rate = figure.subplots(1, 2, width_ratios=(5, 3))
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
        _title(rate, "learning rate", "step")
        timed = history.dropna(subset=["learning_rate"])
        _line(rate, timed["step"], timed["learning_rate"], 0, None, bold=True)
        rate.set_ylim(bottom=0)
        rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    return _render(draw, size=(10.4, 3.2), salt="training")


def guidance(points: Sequence[tuple[float, float, float]], agreement: str) -> Chart:
    """The curve of a sweep: (CLIP score or accuracy, Frechet distance, guidance scale) of each point, in its order."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _title(axes, "Fréchet distance", agreement)
        x, y = [point[0] for point in points], [point[1] for point in points]
        _line(axes, x, y, 0, None, bold=True, marker="o")
        for agreed, distance, scale in points:
            axes.annotate(f"w = {scale:g}", (agreed, distance), (5, 5), textcoords="offset points", fontsize=8.5)
        axes.margins(x=0.12, y=0.18)

    return _render(draw, size=(7.2, 3.2), salt="guidance")


def _title(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel(x_label)


def _line(axes: Axes, x: Any, y: Any, series: int, label: str | None, bold: bool, marker: str = "") -> None:
    style: dict[str, Any] = {
        "color": COLOURS[SERIES[series]],
        "linestyle": DASHES[0 if marker else series],
        "markersize": 4,
    }
    axes.plot(x, y, label=label, linewidth=2.2 if bold else 1.4, marker=marker, zorder=3 if bold else 2, **style)


def _render(draw: Callable[[Figure], None], size: tuple[float, float], salt: str) -> Chart:
    """Draw on a figure of `size` inches. `salt` keeps the ids of the SVGs in one page apart."""
    from matplotlib.figure import Figure

    with _style(salt):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        # Lay it out once, not once for each form.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=PNG_DPI, metadata={"Software": None})
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Type": None})
    return Chart(png.getvalue(), _inline(svg.getvalue(), salt))


@contextmanager
def _style(salt: str) -> Iterator[None]:
    import matplotlib as mpl

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


def _inline(document: str, prefix: str) -> str:
    """A matplotlib SVG file -> an element for an HTML page, coloured by the page's variables."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<(metadata|style).*?</\1>\s*", "", svg, flags=re.DOTALL)
    # Groups and glyphs have the same names in every file, and an id may stand only once in a page.
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)
    svg = re.sub(r'( id="|"#|url\(#)', rf"\1{prefix}-", svg)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.strip()
