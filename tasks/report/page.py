"""The report: everything the chain has to show, in one HTML file that needs no network and no script.

`Report` says what the page holds, `report_page.html` how it looks; `render` joins the two. Pictures travel
inside the file as data: addresses, so it can be mailed; its content security policy forbids all else.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

TEMPLATE = Path(__file__).with_suffix(".html")
TILE_CSS_PIXELS = 64
LARGEST_PIXELATED = 64
"""Side in pixels up to which a picture is enlarged with hard edges; a bigger one is shown as a photograph."""


@dataclass(frozen=True)
class Tiles:
    """Images in rows and columns, each with a heading."""

    images: np.ndarray
    """uint8 [R, K, C, H, W]"""
    row_titles: Sequence[str]
    column_titles: Sequence[str]
    column_notes: Sequence[str] = ()
    """A second line under each column's title."""
    emphasised_row: int | None = None


@dataclass(frozen=True)
class Headline:
    """A number worth seeing first."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Metric:
    """A row of the table of measures; empty strings where a column does not apply."""

    name: str
    value: str
    spread: str
    reference: str
    reading: str


@dataclass(frozen=True)
class Picture:
    """A finished PNG with its caption."""

    png: bytes
    caption: str
    alt: str


@dataclass(frozen=True)
class Neighbours:
    """Samples above their nearest training images, and how near held-out images come."""

    tiles: Tiles
    sample_median: str
    held_out_median: str


@dataclass(frozen=True)
class Table:
    """A table under the measures: a heading, what it says, a chart above it where there is one, and its notes."""

    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[tuple[str, str]] = ()
    chart_svg: str | None = None
    chart_label: str = ""


@dataclass(frozen=True)
class Report:
    """All that the page shows. `*_svg` are `<svg>` elements, trusted as they stand; all other text is escaped."""

    title: str
    facts: Sequence[tuple[str, str]]
    conditional: bool
    prediction: str
    min_snr_gamma: float | None
    """Ceiling of the loss's weights; None where all timesteps weigh the same."""
    schedule: str
    sampler: str
    headlines: Sequence[Headline]
    animation: bytes
    still: bytes
    samples: Tiles
    metrics: Sequence[Metric]
    not_applicable: Sequence[tuple[str, str]]
    few_images: str
    """Why the distances say little; empty where they do not."""
    protocol: str
    tables: Sequence[Table]
    evaluation_grids: Sequence[Picture]
    forward: Tiles
    schedules_svg: str
    forward_by_schedule: Tiles
    reverse: Tiles
    training_svg: str
    progress: Sequence[Picture]
    neighbours: Neighbours | None
    codec: Table | None
    """What stands between images and the model; None where that is nothing."""
    reconstructions: Picture | None
    provenance: Sequence[tuple[str, str]]


def render(report: Report) -> str:
    """The page as HTML; the same report gives the same text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(png=_png_address, tile=_tile_address, tile_style=_tile_style)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(report=report) + "\n"


def _png_address(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _tile_address(image: np.ndarray) -> str:
    from models.pictures import shrunk, tile_png

    return _png_address(tile_png(shrunk(image, 2 * TILE_CSS_PIXELS)))


def _tile_style(tiles: Tiles) -> str:
    """CSS variables: a whole multiple of the image's side, so that all pixels are equally large."""
    side = tiles.images.shape[-1]
    if side > LARGEST_PIXELATED:
        return f"--tile: {TILE_CSS_PIXELS}px; --rendering: auto"
    return f"--tile: {side * max(1, round(TILE_CSS_PIXELS / side))}px; --rendering: pixelated"
