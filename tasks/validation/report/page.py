"""The static page `reports/validation/index.html`, and the rows that the report of `visualize` shows of it.

Great Expectations' Data Docs load scripts from a content delivery network and stay empty offline; this page does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from tasks.runtime import atomic, integrity
from tasks.validation.report import findings
from tasks.validation.report.findings import Argument, Finding, Findings

PAGE, DATA_DOCS = "index.html", "data_docs"
COLUMNS = ("Check", "Expectation", "Observed", "Verdict", "If it fails", "Note")


@dataclass(frozen=True)
class Check:
    """A row of the table of checks, with the fields in the order of `COLUMNS`."""

    check: str
    expectation: str
    observed: str
    verdict: str
    remedy: str
    note: str


def write(folder: Path, found: Findings) -> None:
    """Write `findings.json` and the page that shows it."""
    found.write(folder / findings.FILE)
    atomic.write_text(folder / PAGE, _render(checks(folder), found.quarantined))


def read(folder: Path) -> Findings:
    """Read `findings.json`. Raises `StageError` if it is missing, damaged or of another format."""
    return integrity.read_description(Findings, folder / findings.FILE, "validate")


def checks(folder: Path) -> list[Check]:
    """Rows of the table of checks, failed ones first."""
    return [_check(finding) for finding in sorted(read(folder).findings, key=lambda finding: finding.success)]


def quarantined_by_reason(folder: Path) -> dict[str, int]:
    """Number of quarantined inputs by reason."""
    return read(folder).quarantined


def _check(finding: Finding) -> Check:
    gate = finding.gate
    expectation = _expectation(gate.type, gate.arguments)
    return Check(gate.check, expectation, _observed(finding), finding.verdict, gate.complaint, gate.note)


def _expectation(kind: str, arguments: Mapping[str, Argument]) -> str:
    """`ExpectColumnValuesToBeBetween` and its arguments -> "column values to be between (column width, min 8)"."""
    words = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in kind.removeprefix("Expect"))
    values = ", ".join(f"{name.replace('_', ' ')} {_value(value)}" for name, value in arguments.items())
    return f"{words.strip()}{f' ({values})' if values else ''}"


def _value(value: Argument) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _observed(finding: Finding) -> str:
    named = ", ".join(finding.offenders[:3])
    if not (finding.unexpected and named):
        return finding.observed
    others = finding.unexpected - len(finding.offenders[:3])
    return f"{finding.observed}: {named}{f' and {others} more' if others > 0 else ''}"


def _render(rows: Sequence[Check], quarantined: Mapping[str, int]) -> str:
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    failed = sum(row.verdict == "refused" for row in rows)
    page = environment.from_string(template)
    return page.render(columns=COLUMNS, rows=rows, failed=failed, quarantined=quarantined, docs=DATA_DOCS) + "\n"
