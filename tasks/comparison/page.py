"""The page that compares runs: one HTML file that needs neither network nor scripts.

Template macros and style sheet are those of the report (`tasks/report/page.html`).
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tasks.comparison import charts
from tasks.report import page as report
from tasks.report.page import Table, Tiles
from tasks.report.tables import MEASURES, sampler_name
from tasks.runtime.measures import SHORT_FINGERPRINT, Measure, guidance_name
from tasks.sweeps import leaderboard, significance
from tasks.sweeps.significance import Sample
from tasks.sweeps.spec import direction

if TYPE_CHECKING:
    from tasks.comparison.subject import Subject
    from tasks.sweeps.leaderboard import Board

TEMPLATE = Path(__file__).with_suffix(".html")
SAME = "no difference beyond the spread"
MOST_SAMPLES = 10
"""Samples of each run."""


@dataclass(frozen=True)
class Page:
    """The content of the page; all text except `curves_svg` is escaped."""

    title: str
    runs: Table
    """The short name of each run, with its name and how it was sampled."""
    leaderboard: Table | None
    """Of a sweep, over its training seeds; None for other comparisons."""
    samples: Sequence[tuple[str, str, Tiles]]
    """Title, text and images: a row for each run, a column for each seed."""
    samples_refused: Sequence[str]
    refusals: Sequence[str]
    """Why numbers are not compared, in one sentence each."""
    measures: Sequence[Table]
    """One table for the runs of each fingerprint."""
    parameters: Table | None
    """The parameters that differ; None if none does."""
    curves_svg: str | None
    curves_text: str
    provenance: Sequence[tuple[str, str]]


def render(page: Page) -> str:
    """Return the page as HTML; equal content gives equal text."""
    source, environment = report.TEMPLATE.read_text(encoding="utf-8"), report.environment()
    macros, style = source[: source.index("<!doctype html>")], source.partition("<style>")[2].partition("</style>")[0]
    template = environment.from_string(macros + TEMPLATE.read_text(encoding="utf-8"))
    return template.render(page=page, style=f"{style}\n{STYLE}").lstrip() + "\n"


STYLE = ".refusal { border-left: 3px solid var(--series-2); padding-left: .8rem; color: var(--ink); }\n"


def build(subjects: Sequence[Subject], title: str, board: Board | None = None) -> Page:
    """Return the page for at least two subjects; `board` is the leaderboard of the sweep that they belong to."""
    names = short_names(len(subjects))
    drawn = charts.curves({name: subject.curves for name, subject in zip(names, subjects, strict=True)})
    samples, refused = _samples(subjects, names)
    return Page(
        title=title,
        runs=_runs(subjects, names),
        leaderboard=_leaderboard(board) if board else None,
        samples=samples,
        samples_refused=refused,
        refusals=list(refusals(subjects, names)),
        measures=[_measures(group) for group in _groups(subjects, names)],
        parameters=_parameters(subjects, names),
        curves_svg=drawn.svg if drawn else None,
        curves_text=_curves_text(subjects),
        provenance=[(name, subject.origin) for name, subject in zip(names, subjects, strict=True)],
    )


def short_names(count: int) -> list[str]:
    """Return A, B, C, ...; numbers for more runs than there are letters."""
    letters = string.ascii_uppercase
    return list(letters[:count]) if count <= len(letters) else [str(number) for number in range(1, count + 1)]


def _runs(subjects: Sequence[Subject], names: Sequence[str]) -> Table:
    rows = []
    for name, subject in zip(names, subjects, strict=True):
        measured = subject.measured
        guidance = guidance_name(measured.guided_scale, measured.guided_kind) if measured.guided_scale else "none"
        sampler = sampler_name(measured.sampler, measured.steps)
        rows.append([name, subject.name, sampler, guidance, measured.fingerprint[:SHORT_FINGERPRINT]])
    columns = ["Run", "Name", "Sampler", "Guidance", "Fingerprint"]
    return Table("What is compared", "The other sections use the letters.", columns, rows, worded=["Name"])


def _curves_text(subjects: Sequence[Subject]) -> str:
    text = "The training loss is a running mean over a twentieth of the run."
    keys = ("diffusion.prediction", "diffusion.schedule", "diffusion.loss_weighting", "diffusion.timestep_density")
    differing = [key for key in keys if len({subject.params.get(key) for subject in subjects}) > 1]
    if differing:
        text += f" The runs differ in {' and '.join(differing)}, so the heights of their losses cannot be compared."
    return text


def _groups(subjects: Sequence[Subject], names: Sequence[str]) -> list[dict[str, Subject]]:
    """The subjects by fingerprint, in the order of the first of each: name -> subject."""
    groups: dict[str, dict[str, Subject]] = {}
    for name, subject in zip(names, subjects, strict=True):
        groups.setdefault(subject.measured.fingerprint, {})[name] = subject
    return list(groups.values())


def refusals(subjects: Sequence[Subject], names: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for each group of runs that was measured differently from the first: which, and in what."""
    first, *others = _groups(subjects, names)
    reference = next(iter(first.values()))
    for group in others:
        other = next(iter(group.values()))
        differing = list(_differences(reference.protocol["measurement"], other.protocol["measurement"]))
        yield (
            f"The numbers of {_listed(group)} are not compared with those of {_listed(first)}, because they were "
            f"measured differently ({'; '.join(differing) or 'other fingerprints'}); evaluate all by one protocol."
        )


def _listed(group: Mapping[str, Subject]) -> str:
    return " and ".join(f"{name} ({subject.name})" for name, subject in group.items())


def _differences(a: Mapping[str, object], b: Mapping[str, object]) -> Iterator[str]:
    for key in sorted({*a, *b}):
        one, other = a.get(key), b.get(key)
        if one != other:
            plain = all(isinstance(value, int | float | str) for value in (one, other))
            yield f"{key} is {other} and not {one}" if plain else f"another {key}"


def _samples(subjects: Sequence[Subject], names: Sequence[str]) -> tuple[list[tuple[str, str, Tiles]], list[str]]:
    """Rows of samples from the same seeds and labels, and why others are not shown."""
    first = subjects[0]
    same = [
        (name, subject)
        for name, subject in zip(names, subjects, strict=True)
        if (subject.seed, subject.labels) == (first.seed, first.labels)
    ]
    left = [name for name in names if name not in dict(same)]
    refused = [f"Not shown: {', '.join(left)}, which was sampled from other seeds or classes."] if left else []
    found = []
    for drawn in ("unguided", "guided"):
        rows = [(name, subject) for name, subject in same if drawn in subject.samples]
        if not rows:
            continue
        tiles = [subject.samples[drawn][:MOST_SAMPLES] for _, subject in rows]
        count = min(map(len, tiles))
        notes = first.labels[:count] if first.labels else []
        text = "Each column has the same initial noise" + (" and class" if notes else "") + "; rows are runs."
        table = Tiles(
            images=_stacked([row[:count] for row in tiles]),
            row_titles=[name for name, _ in rows],
            column_titles=[str(first.seed + index) for index in range(count)],
            column_notes=notes,
        )
        found.append((f"{drawn.capitalize()} samples by seed", text, table))
    return found, refused


def _stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Stack rows of images, uint8 [R, K, 3, H, W]; smaller images are enlarged to the largest side."""
    side = max(row.shape[-1] for row in rows)

    def enlarged(image: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(image.transpose(1, 2, 0)).resize((side, side), Image.Resampling.NEAREST)
        return np.asarray(picture).transpose(2, 0, 1)

    return np.stack(
        [np.stack([enlarged(image) if image.shape[-1] != side else image for image in row]) for row in rows]
    )


def _measures(group: Mapping[str, Subject]) -> Table:
    """The numbers of runs with one fingerprint; the last column compares them with the first run."""
    first, *others = group
    measured = {name: subject.measured for name, subject in group.items()}
    keys = list(dict.fromkeys(key for each in measured.values() for key in each.measures))
    columns = ["Measure", *group, *([f"Compared with {first}"] if others else [])]
    rows = []
    for key in [key for key in MEASURES if key in keys] + [key for key in keys if key not in MEASURES]:
        found = {name: each.measures.get(key) for name, each in measured.items()}
        cells = [_cell(measure) for measure in found.values()]
        title = f"{MEASURES[key][0] if key in MEASURES else key}, {next(filter(None, found.values())).drawn}"
        blocks = {name: each.seed_blocks for name, each in measured.items()}
        rows.append([title, *cells, *([_compared(key, found, blocks)] if others else [])])
    text = (
        "Mean ± standard deviation over the seed blocks of samples. This is the spread of sampling, not of training. "
        f"{significance.RULE} Fingerprint {measured[first].fingerprint[:SHORT_FINGERPRINT]}."
    )
    title = "Numbers" if others else f"Numbers of {first}"
    return Table(title, text, columns, rows, worded=columns[-1:] if others else [])


def _cell(measure: Measure | None) -> str:
    return "" if measure is None else f"{measure.value:.3g} ± {measure.spread:.2g}".replace("-", "−")


def _compared(key: str, found: Mapping[str, Measure | None], blocks: Mapping[str, int]) -> str:
    """Compare the numbers of all runs with that of the first, in words."""
    (first, reference), *others = found.items()
    if reference is None:
        return ""
    base = Sample(reference.value, reference.spread, blocks[first])
    lower_is_better = direction(f"{key}_{reference.drawn}") == "minimize"
    verdicts: dict[str, list[str]] = {}
    for name, measure in others:
        if measure is not None:
            sample = Sample(measure.value, measure.spread, blocks[name])
            better = (measure.value < reference.value) == lower_is_better
            verdict = ("better" if better else "worse") if significance.differ(sample, base) else SAME
            verdicts.setdefault(verdict, []).append(name)
    return "; ".join(f"{', '.join(names)}: {verdict}" for verdict, names in verdicts.items())


def _parameters(subjects: Sequence[Subject], names: Sequence[str]) -> Table | None:
    """The parameters in which the subjects differ; one that a run did not record is "–"."""
    keys = sorted({key for subject in subjects for key in subject.params})
    rows = []
    for key in keys:
        values = [subject.params.get(key) for subject in subjects]
        known = {value for value in values if value is not None}
        if len(known) > 1:
            rows.append([key, *(value if value is not None else "–" for value in values)])
    text = "Parameters that affect weights or numbers and that differ between the runs."
    return Table("Differences", text, ["Parameter", *names], rows) if rows else None


def _leaderboard(board: Board) -> Table:
    rows = leaderboard.table(board)
    columns = list(rows[0]) if rows else []
    notes = [("Not ranked", board.refusal)] if board.refusal else []
    notes += [("Without a result", "; ".join(board.missing))] if board.missing else []
    text = f"Mean ± standard deviation over the training seeds, the best first. {significance.RULE}"
    cells = [list(row.values()) for row in rows]
    return Table("Combinations", text, columns, cells, notes=notes, worded=["compared with the best"])
