"""The section of the report on image-to-image and inpainting, from what stage `edit` wrote."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

from tasks.report import charts
from tasks.report.page import Experiment, Picture, Table

if TYPE_CHECKING:
    from pathlib import Path

    from tasks.report.plotting import Chart

STRENGTHS, FILLS = "strengths", "fills"
"""Names of the tables and pictures in `reports/editing`."""
STRENGTH_COLUMNS = {
    "strength": "Strength",
    "n": "n",
    "psnr": "PSNR, dB",
    "feature_distance": "To own input",
    "frechet_to_input": "Fréchet to inputs",
    "frechet_to_data": "Fréchet to data",
    "asked_share": "As asked",
    "asked_share_ignored": "Condition ignored",
}
FILL_COLUMNS = {
    "mask": "Mask",
    "fill": "Filled by",
    "n": "n",
    "known_error": "Error outside",
    "psnr": "PSNR inside, dB",
    "feature_distance": "To own original",
    "frechet_to_data": "Fréchet to data",
    "own_share": "Own class",
}
SHARES = ("asked_share", "asked_share_ignored", "own_share")
WORDS, WHOLE = ("mask", "fill"), ("n", "known_error")
STRENGTH_TEXT = (
    "Held-out images are edited with the condition of another class or caption. “To own input” is the mean distance "
    "between the judge's features of an image and of its edit. “As asked” is the share that the judge assigns to the "
    "condition asked for; “condition ignored” is the same share if the model is given what the image shows instead."
)
FILL_TEXT = (
    "The masked region of held-out images, filled by the model with the right condition and with another one "
    "(“wrong condition”), by the mean colour outside the mask, and by the same region of the training image that is "
    "nearest outside it. “Error outside” is the largest difference of a pixel that was to be kept, 0 to 255. “Own "
    "class” is the share that the judge still assigns to the image's own condition."
)
BIAS = "Fréchet distances over so few images are too large by about as much in every row; compare rows, not reports."


def section(editing: Path, chart: Chart | None) -> Experiment | None:
    """Return the section with the `chart` of the edits; None if nothing was edited."""
    strengths, fills = (_read(editing / f"{name}.csv") for name in (STRENGTHS, FILLS))
    if not strengths and not fills:
        return None
    tables, pictures = [], []
    if strengths:
        label, svg = _label(strengths), chart.svg if chart else None
        columns, rows = _cells(strengths, STRENGTH_COLUMNS)
        notes = [("Fréchet distances", BIAS)]
        tables.append(Table("Image-to-image", STRENGTH_TEXT, columns, rows, notes, svg, label))
        shown = ", ".join(f"{float(row['strength']):g}" for row in strengths)
        caption = f"Image-to-image: the given image, then its edits at strength {shown}"
        pictures.append(_picture(editing, STRENGTHS, caption, "Rows of a held-out image and its edits by strength"))
    if fills:
        columns, rows = _cells(fills, FILL_COLUMNS)
        tables.append(Table("Inpainting", FILL_TEXT, columns, rows, worded=["Filled by"]))
        caption = "Inpainting: the masked image, then each way to fill it, for each kind of mask"
        pictures.append(_picture(editing, FILLS, caption, "Rows of masked held-out images and of their fills"))
    return Experiment("editing", "Editing images", "Held-out images as the start of sampling.", tables, pictures)


def chart_of(editing: Path) -> Chart | None:
    """Return the chart by strength; None without image-to-image."""
    rows = _read(editing / f"{STRENGTHS}.csv")
    return charts.strengths(*_curves(rows)) if rows else None


def _label(rows: list[dict[str, str]]) -> str:
    label = "Line charts over the strength: PSNR to the input, Fréchet distances to inputs and data"
    if any(row["asked_share"] for row in rows):
        label += ", and the share that becomes what was asked for"
    return f"{label}."


def _curves(rows: list[dict[str, str]]) -> tuple[list[float], dict[str, dict[str, list[float]]]]:
    """Return the strengths, and the lines of each panel by their name."""

    def line(key: str) -> list[float]:
        return [float(row[key]) for row in rows if row[key]]

    panels = {
        "PSNR to the input, dB": {"": line("psnr")},
        "Fréchet distance": {"to the inputs": line("frechet_to_input"), "to the data": line("frechet_to_data")},
        "share as asked": {"as asked": line("asked_share"), "condition ignored": line("asked_share_ignored")},
    }
    complete = {title: lines for title, lines in panels.items() if all(len(y) == len(rows) for y in lines.values())}
    return line("strength"), complete


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _cells(rows: list[dict[str, str]], known: dict[str, str]) -> tuple[list[str], list[list[str]]]:
    """Return the titles of the columns that are not empty, and the formatted rows."""
    keys = [key for key in known if any(row[key] for row in rows)]

    def cell(key: str, text: str) -> str:
        if not text or key in WORDS or key in WHOLE:
            return text or "–"
        return f"{100 * float(text):.1f} %" if key in SHARES else f"{float(text):.3g}"

    return [known[key] for key in keys], [[cell(key, row[key]) for key in keys] for row in rows]


def _picture(editing: Path, name: str, caption: str, alt: str) -> Picture:
    return Picture((editing / f"{name}.png").read_bytes(), caption, alt)
