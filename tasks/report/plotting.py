"""How the report's charts look: panels as a PNG without metadata, and as inline SVGs that follow the page's theme."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

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


def title_axes(axes: Axes, title: str, x_label: str) -> None:
    """Name the vertical quantity above the axes and the horizontal one below them, both with their units."""
    axes.set_title(title, loc="left")
    axes.set_xlabel(x_label)


def line(axes: Axes, x: Values, y: Values, series: int, label: str | None, bold: bool, marker: str = "") -> None:
    """Draw the line number `series`; it has a colour of its own, and without markers also a dash pattern."""
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


def render(panels: Sequence[Callable[[Axes], None]], widths: Sequence[float], salt: str, rows: int = 1) -> Chart:
    """Draw panels of `widths` inches as one PNG, and each as an SVG; `salt` makes the ids in the SVGs unique.

    The canvases are called directly, because `Figure.savefig` draws every figure twice, first for its layout alone.

    The PNG has `rows` rows, among which the panels are divided in their order as evenly as possible.
    """
    png, elements = io.BytesIO(), []
    with _style(salt):
        parts = [list(part) for part in np.array_split(np.arange(len(panels)), rows)]
        wide = max(sum(widths[i] for i in part) for part in parts)
        figure = Figure(figsize=(wide, HEIGHT * rows), layout="constrained")
        strips = figure.subfigures(rows, 1, squeeze=False)[:, 0]
        for part, strip in zip(parts, strips, strict=True):
            axes = strip.subplots(1, len(part), width_ratios=[widths[i] for i in part], squeeze=False)[0]
            for i, panel in zip(part, axes, strict=True):
                panels[i](panel)
        figure.set_dpi(PNG_DPI)
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    for number, (draw, width) in enumerate(zip(panels, widths, strict=True)):
        with _style(f"{salt}{number}"):
            figure, svg = Figure(figsize=(width, HEIGHT), layout="constrained", facecolor="none"), io.StringIO()
            draw(figure.subplots(subplot_kw={"facecolor": "none"}))
            FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None, "Type": None})
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
