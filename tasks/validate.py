"""The stage `validate`: check the metadata of the dataset with Great Expectations before any model is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.formats.verdict import Verdict
from tasks.params import Demands, ValidateParams
from tasks.runtime import atomic, stage
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from tasks.validation.report.findings import Finding

NAMED_OFFENDERS = 5
"""Number of rows that the message of a failed gate names."""


def validate(
    images: Path, quarantine: Path, accepted: Path, reports: Path, params: ValidateParams, asked: Demands
) -> None:
    """Check the dataset; write reports/validation, and data/accepted.json if every gate holds.

    A failed gate ends the stage with an error that names the first rows concerned. Without data/accepted.json no later
    stage runs. Failed gates of the checks in `validate.warn_only` only print a warning. `asked` holds the parameters of
    later stages that place demands on the data.
    """
    from tasks.formats.quarantine import read_index as read_quarantine_index
    from tasks.pictures.index import read_index
    from tasks.validation import expectations, tables
    from tasks.validation.report import page
    from tasks.validation.report.findings import Findings

    index = read_index(images)
    params = params.model_copy(update={"min_side": params.min_side or asked.resolution})
    print(f"validate: {index.rows} rows, loading Great Expectations", flush=True)
    counts = tables.label_counts(images, index.classes)
    with atomic.writing_folder(reports) as folder:
        built = tables.build(images, quarantine, index, counts, params, asked)
        findings = expectations.judge(built, folder / page.DATA_DOCS, params.warn_only)
        page.write(folder, Findings(findings, read_quarantine_index(quarantine).quarantined))
    for note in dict.fromkeys(finding.gate.note for finding in findings if finding.gate.note):
        print(f"validate: {note}")
    failed = [finding for finding in findings if not finding.success]
    warnings = [_complaint(finding) for finding in failed if finding.severity == "warning"]
    for complaint in warnings:
        print(f"validate: warning: {complaint}")
    refusals = [_complaint(finding) for finding in failed if finding.severity == "failure"]
    if refusals:
        raise StageError(f"the data is not accepted: {'; '.join(refusals)}; {reports / 'index.html'} shows every check")
    Verdict(index.source, index.sha256, index.rows, counts).write(accepted)
    held = f"{len(findings) - len(failed)} of {len(findings)} gates hold"
    print(f"validate: accepted, {held}, {len(failed)} warn; see {reports / 'index.html'}")


def _complaint(finding: Finding) -> str:
    """The message of a failed gate, with the first rows concerned."""
    shown = finding.offenders[:NAMED_OFFENDERS]
    more = finding.unexpected - len(shown)
    names = f" ({', '.join(shown)}{f' and {more} more' if more > 0 else ''})" if shown else ""
    return f"{finding.gate.complaint}{names}"


if __name__ == "__main__":
    stage.main(validate)
