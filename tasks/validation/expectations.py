"""Great Expectations, reduced to what `validate` needs: tables with expectations in, findings and Data Docs out."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

# Great Expectations names folders of its Data Docs after the time of the run. The time says nothing
# that the data's hash does not say better, and one time for all keeps the paths stable.
NO_TIME = datetime(2000, 1, 1, tzinfo=UTC)

# What else differs between two renderings of one result.
REMOTE_LOGO = re.compile(r'(?<=src=")https://[^"]*/(logo-long\.png)\?d=[^"]*')
LOAD_TIME = re.compile(r"(?<=>)\d{8}T\d{6}\.\d{6}Z(?=</span>)")
RANDOM_ANCHOR = re.compile(r"(?<=collapse-body-)[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Gate:
    """One expectation about a table, and what its failure means."""

    check: str
    """What it belongs to, such as "size"; the severity is decided by it."""
    type: str
    """Name of the expectation, such as "ExpectColumnValuesToBeBetween"."""
    arguments: dict[str, Any]
    complaint: str
    """What is wrong and what to do, for the person who sees it fail."""


@dataclass(frozen=True)
class Table:
    """Rows to be judged. The column `key` names a row."""

    name: str
    frame: pd.DataFrame
    gates: list[Gate]


@dataclass(frozen=True)
class Finding:
    """What became of one gate."""

    gate: Gate
    success: bool
    unexpected: int
    """Rows that do not meet the expectation (they may be within the tolerance of a gate that holds)."""
    offenders: list[str]
    """Keys of the first of them."""


def judge(tables: list[Table], docs: Path, warn_only: Collection[str] = ()) -> list[Finding]:
    """Run every gate over its table and write the Data Docs site into the folder `docs` (`index.html` is its door).

    The pages show the checks in `warn_only` with the severity "warning", the others with "critical".
    """
    os.environ["GX_ANALYTICS_ENABLED"] = "False"
    import great_expectations as gx
    from great_expectations.core.run_identifier import RunIdentifier

    logging.getLogger("great_expectations").setLevel(logging.WARNING)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    context.add_data_docs_site("validation", _site(docs))
    source = context.data_sources.add_pandas("data")
    findings = []
    for table in tables:
        batches = source.add_dataframe_asset(table.name).add_batch_definition_whole_dataframe("all")
        suite = context.suites.add(gx.ExpectationSuite(name=table.name))
        for gate in table.gates:
            severity = "warning" if gate.check in warn_only else "critical"
            suite.add_expectation(getattr(gx.expectations, gate.type)(**gate.arguments, severity=severity))
        definition = gx.ValidationDefinition(name=table.name, data=batches, suite=suite)
        result = context.validation_definitions.add(definition).run(
            batch_parameters={"dataframe": table.frame},
            run_id=RunIdentifier(run_name="validate", run_time=NO_TIME),
            result_format={"result_format": "SUMMARY", "unexpected_index_column_names": ["key"]},
        )
        findings += [_finding(gate, its) for gate, its in zip(table.gates, result.results, strict=True)]
    context.build_data_docs()
    for page in docs.rglob("*.html"):
        page.write_text(_settled(page.read_text(encoding="utf-8"), page.relative_to(docs)), encoding="utf-8")
    return findings


def _site(docs: Path) -> dict[str, Any]:
    return {
        "class_name": "SiteBuilder",
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        # The results show every expectation; pages that list them once more would double the time.
        "site_section_builders": {"expectations": "None", "profiling": "None"},
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.resolve())},
    }


def _settled(page: str, path: Path) -> str:
    """A page that is the same for the same result: without the time of its making, numbered anchors, the logo that
    lies beside it instead of one that is fetched from its maker at each visit."""
    anchors: dict[str, str] = {}
    page = REMOTE_LOGO.sub(rf"{'../' * (len(path.parts) - 1)}static/images/\1", page)
    page = LOAD_TIME.sub(f"{NO_TIME:%Y%m%dT%H%M%S.%fZ}", page)
    return RANDOM_ANCHOR.sub(lambda found: anchors.setdefault(found[0], str(len(anchors))), page)


def _finding(gate: Gate, result: Any) -> Finding:
    found = result.result
    if result.exception_info.get("raised_exception"):
        raise RuntimeError(f"{gate.type} could not be run: {result.exception_info['exception_message']}")
    rows = found.get("partial_unexpected_index_list") or []
    return Finding(gate, bool(result.success), found.get("unexpected_count", 0), [str(row["key"]) for row in rows])
