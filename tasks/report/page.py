"""The report as one HTML file: `Report` is its content, `page.html` its template, `render` joins the two.

The file needs neither network nor scripts and can be sent by mail: pictures are embedded as `data:` addresses, and the
content security policy forbids everything else.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined

from models.images.pictures import png_bytes, shrunk, tile_png

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from tasks.report.animations import Animation
    from tasks.report.plotting import Chart

TEMPLATE = Path(__file__).with_suffix(".html")
TILE_CSS_PIXELS, NARROW_TILE = 64, 32
"""Side of a tile in CSS pixels, roughly; the second is for narrow pages."""
LARGEST_PIXELATED = 64
"""Largest side in pixels of images that are enlarged with hard edges; larger ones are interpolated."""


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
class Figure:
    """A titled picture of one kind: a table of images, a chart, or neither, which leaves a sentence in its place."""

    title: str
    text: Sequence[str]
    """Paragraphs."""
    tiles: Tiles | None = None
    label: str = ""
    """What it shows, for readers who cannot see it."""
    chart: Chart | None = None
    animation: Animation | None = None
    """Shown below the table of images."""

    @property
    def drawn(self) -> bool:
        """Whether there is a picture."""
        return self.tiles is not None or self.chart is not None


@dataclass(frozen=True)
class Headline:
    """A number in large type at the top of the section."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Metric:
    """A row of the table of measures; empty strings where a column does not apply."""

    name: str
    guidance: str
    """Such as "w = 1.5", or "none"."""
    value: str
    spread: str
    reference: str
    reading: str


@dataclass(frozen=True)
class Measures:
    """The section of measures: headline numbers, table, and how they were taken."""

    headlines: Sequence[Headline]
    metrics: Sequence[Metric]
    not_applicable: Sequence[tuple[str, str]]
    """Name and reason of each measure that was not taken."""
    few_images: str
    """Why the distances are unreliable; empty if they are reliable."""
    protocol: str
    """Sampler, sample counts and guidance, in one sentence."""


@dataclass(frozen=True)
class Picture:
    """A finished PNG with its caption."""

    png: bytes
    caption: str
    alt: str


@dataclass(frozen=True)
class Neighbours:
    """Samples above their nearest training images, and the median distances of samples and held-out images."""

    tiles: Tiles
    sample_median: str
    held_out_median: str


@dataclass(frozen=True)
class Table:
    """A table with heading, description, optional chart above it, and notes below it."""

    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[tuple[str, str]] = ()
    chart_svg: str | None = None
    chart_label: str = ""
    worded: Sequence[str] = ()
    """Names of the columns that contain text rather than numbers."""


@dataclass(frozen=True)
class Experiment:
    """A section with tables and pictures of one experiment."""

    anchor: str
    """Its address in the page."""
    title: str
    text: str
    tables: Sequence[Table]
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Report:
    """The content of the page. `*_svg` are `<svg>` elements and inserted as they are; all other text is escaped."""

    title: str
    facts: Sequence[tuple[str, str]]
    conditional: bool
    guidance: str | None
    """Kind of guidance of `samples`, one of `samplers.GUIDANCES`; None if none of them is guided."""
    prediction: str
    min_snr_gamma: float | None
    """gamma of the min-SNR loss weighting (Hang et al. 2023); None without weighting."""
    schedule: str
    sampler: str
    animation: bytes
    still: bytes
    """PNG files; the second stands in for the first if the reader prefers reduced motion."""
    samples: Tiles
    measures: Measures
    tables: Sequence[Table]
    evaluation_grids: Sequence[Picture]
    experiments: Sequence[Experiment]
    figures: Mapping[str, Figure]
    """Further pictures by name, see `visualize`."""
    forward: Tiles
    schedules: Figure
    """With a chart."""
    forward_by_schedule: Tiles
    reverse: Tiles
    training_svg: str
    progress: Sequence[Picture]
    neighbours: Neighbours | None
    data: Sequence[Table]
    """The result of every check of the data, and the quarantined inputs."""
    codec: Table | None
    """Quality of autoencoder and text encoder; None without them."""
    reconstructions: Picture | None
    provenance: Sequence[tuple[str, str]]


def render(report: Report) -> str:
    """Return the page as HTML; equal reports give equal text."""
    return environment().from_string(TEMPLATE.read_text(encoding="utf-8")).render(report=report) + "\n"


def environment() -> Environment:
    """Return the settings and filters of the template; `tasks/comparison/page.py` renders with them, too."""
    found = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.filters.update(png=_png_address, picture=_picture_address, tile=_tile_address, tile_style=_tile_style)
    return found


def _png_address(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _picture_address(image: Image.Image) -> str:
    return _png_address(png_bytes(image))


def _tile_address(image: np.ndarray) -> str:
    return _png_address(tile_png(shrunk(image, 2 * TILE_CSS_PIXELS)))


def _tile_style(tiles: Tiles) -> str:
    """Return CSS variables: the number of columns, and the side of a tile on wide and narrow pages.

    Sides are whole multiples of the image's side, so that all pixels are equally large. Ten tiles fit on a narrow page.
    """
    side, columns = tiles.images.shape[-1], tiles.images.shape[1]
    narrow = f"--small-tile: {side * max(1, NARROW_TILE // side) if side <= NARROW_TILE else NARROW_TILE}px"
    if side > LARGEST_PIXELATED:
        return f"--columns: {columns}; {narrow}; --wide-tile: {TILE_CSS_PIXELS}px; --rendering: auto"
    wide = side * max(1, round(TILE_CSS_PIXELS / side))
    return f"--columns: {columns}; {narrow}; --wide-tile: {wide}px; --rendering: pixelated"
