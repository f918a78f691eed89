"""What the gates found, for people: one static page beside Great Expectations' own, and the rows of the report.

Data Docs need scripts from a content delivery network and are empty without one; this page needs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.runtime import atomic

if TYPE_CHECKING:
    from tasks.validation.expectations import Finding

FINDINGS, QUARANTINE, PAGE, DATA_DOCS = "findings.json", "quarantine.json", "index.html", "data_docs"
COLUMNS = ("Check", "Expectation", "Observed", "Verdict", "If it fails")


@dataclass(frozen=True)
class Check:
    """A row of the table of checks."""

    check: str
    expectation: str
    observed: str
    verdict: str
    remedy: str


def write(folder: Path, findings: Sequence[Finding], warn_only: Sequence[str], quarantined: Mapping[str, int]) -> None:
    """Write the findings and the numbers of quarantined inputs by reason as JSON, and the page that shows them."""
    rows = [
        {**asdict(finding), "severity": "warning" if finding.gate.check in warn_only else "failure"}
        for finding in findings
    ]
    atomic.write_json(folder / FINDINGS, rows)
    atomic.write_json(folder / QUARANTINE, dict(quarantined))
    atomic.write_text(folder / PAGE, _render(checks(folder), quarantined_by_reason(folder)))


def checks(folder: Path) -> list[Check]:
    """The rows of `findings.json`, those that do not hold first."""
    findings = json.loads((folder / FINDINGS).read_text(encoding="utf-8"))
    return [_check(finding) for finding in sorted(findings, key=lambda finding: finding["success"])]


def quarantined_by_reason(folder: Path) -> dict[str, int]:
    """Number of inputs in quarantine by reason."""
    return dict(json.loads((folder / QUARANTINE).read_text(encoding="utf-8")))


def _check(finding: Mapping[str, Any]) -> Check:
    gate = finding["gate"]
    failed = "warning" if finding["severity"] == "warning" else "refused"
    return Check(
        gate["check"],
        _expectation(gate["type"], gate["arguments"]),
        _observed(finding),
        "holds" if finding["success"] else failed,
        gate["complaint"],
    )


def _expectation(kind: str, arguments: Mapping[str, Any]) -> str:
    """`ExpectColumnValuesToBeBetween` and its arguments -> "column values to be between: column width, min 8"."""
    words = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in kind.removeprefix("Expect"))
    given = ", ".join(f"{name.replace('_', ' ')} {_value(value)}" for name, value in arguments.items())
    return f"{words.strip()}{f' ({given})' if given else ''}"


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _observed(finding: Mapping[str, Any]) -> str:
    if not finding["unexpected"]:
        return str(finding["observed"])
    named = ", ".join(finding["offenders"][:3])
    others = finding["unexpected"] - len(finding["offenders"][:3])
    more = f" and {others} more" if named and others > 0 else ""
    return f"{finding['observed']}: {named}{more}" if named else str(finding["observed"])


def _render(rows: Sequence[Check], quarantined: Mapping[str, int]) -> str:
    from jinja2 import Environment, StrictUndefined

    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    failed = sum(row.verdict == "refused" for row in rows)
    page = environment.from_string(template)
    return page.render(columns=COLUMNS, rows=rows, failed=failed, quarantined=quarantined, docs=DATA_DOCS) + "\n"
