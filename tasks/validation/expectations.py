"""The only use of Great Expectations: tables with gates in, findings and Data Docs out."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tasks.validation.report.findings import Finding, Gate

if TYPE_CHECKING:
    import pandas as pd

SITE = "validation"
"""Name of the Data Docs."""

# Great Expectations names folders of its Data Docs after the time of the run. A constant time keeps the paths stable;
# the version of the data is identified by its hash.
NO_TIME = datetime(2000, 1, 1, tzinfo=UTC)

# Other parts of a page that differ between two renderings of one result.
REMOTE_LOGO = re.compile(r'(?<=src=")https://[^"]*/(logo-long\.png)\?d=[^"]*')
LOAD_TIME = re.compile(r"(?<=>)\d{8}T\d{6}\.\d{6}Z(?=</span>)")
RANDOM_ANCHOR = re.compile(r"(?<=collapse-body-)[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Table:
    """Rows to validate, identified by the column `key`, and the gates for them."""

    name: str
    frame: pd.DataFrame
    gates: list[Gate]
    part: int | None = None
    """Number of the part, if the table is judged in parts that follow each other; all have the same gates."""

    @property
    def title(self) -> str:
        """Name in the Data Docs."""
        return self.name if self.part is None else f"{self.name}, part {self.part}"


def judge(tables: Iterable[Table], docs: Path, warn_only: Collection[str] = ()) -> list[Finding]:
    """Run every gate on its table and write the Data Docs site into the folder `docs` (start page `index.html`).

    One table at a time is in memory if `tables` makes them one after the other. Parts of a table give one finding for
    each gate, see `_joined`.

    Checks in `warn_only` get the severity "warning", in the findings as in the pages; the others are critical.
    The gates of a table must differ in type or arguments: Great Expectations merges equal expectations of a suite.
    """
    os.environ["GX_ANALYTICS_ENABLED"] = "False"
    # Great Expectations reads the variable when it is imported, and takes seconds.
    import great_expectations as gx
    from great_expectations.core.run_identifier import RunIdentifier

    logging.getLogger("great_expectations").setLevel(logging.WARNING)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    source = context.data_sources.add_pandas("data")
    results: dict[str, list[tuple[Gate, list[Any]]]] = {}  # Great Expectations is not typed
    for table in tables:
        _require_distinct(table)
        batches = source.add_dataframe_asset(table.title).add_batch_definition_whole_dataframe("all")
        # All at once: `suite.add_expectation` stores the whole suite again for each expectation.
        expected = [
            getattr(gx.expectations, gate.type)(
                **gate.arguments,
                severity="warning" if gate.check in warn_only else "critical",
                notes=gate.note or None,
            )
            for gate in table.gates
        ]
        suite = context.suites.add(gx.ExpectationSuite(name=table.title, expectations=expected))
        definition = gx.ValidationDefinition(name=table.title, data=batches, suite=suite)
        outcome = context.validation_definitions.add(definition).run(
            batch_parameters={"dataframe": table.frame},
            run_id=RunIdentifier(run_name="validate", run_time=NO_TIME),
            result_format={"result_format": "SUMMARY", "unexpected_index_column_names": ["key"]},
        )
        # The engine keeps the frame of each table until the end.
        source.get_execution_engine().batch_manager.reset_batch_cache()
        source.get_execution_engine().batch_manager.batch_data_cache.clear()
        known = results.setdefault(table.name, [(gate, []) for gate in table.gates])
        for (_, parts), result in zip(known, outcome.results, strict=True):
            parts.append(result)
        del table  # before the next one is made
    write_docs(context, docs)
    return [
        _finding(gate, parts[0], gate.check in warn_only)
        if len(parts) == 1
        else _joined(gate, parts, gate.check in warn_only)
        for gates in results.values()
        for gate, parts in gates
    ]


def write_docs(context: Any, docs: Path) -> None:  # Great Expectations is not typed
    """Write the Data Docs of the validations in `context` into the folder `docs`."""
    context.add_data_docs_site(SITE, _site(docs))
    context.build_data_docs([SITE])  # the context has one of its own, in a temporary folder that it never removes
    for page in docs.rglob("*.html"):
        page.write_text(_reproducible(page.read_text(encoding="utf-8"), page.relative_to(docs)), encoding="utf-8")


def _require_distinct(table: Table) -> None:
    """Assert that no two gates expect the same; with a merged one, the results would belong to the wrong gates."""
    expected = [(gate.type, dict(gate.arguments)) for gate in table.gates]
    repeated = [gate.check for number, gate in enumerate(table.gates) if expected[number] in expected[:number]]
    assert not repeated, f"gates of the table '{table.name}' expect the same twice: {', '.join(repeated)}"


def _site(docs: Path) -> dict[str, object]:
    from tasks.validation.docs_store import SortedFolder

    return {
        "class_name": "SiteBuilder",
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        # The results show every expectation; separate pages for the suites would double the time.
        "site_section_builders": {"expectations": "None", "profiling": "None"},
        "store_backend": {
            "module_name": SortedFolder.__module__,
            "class_name": SortedFolder.__name__,
            "base_directory": str(docs.resolve()),
        },
    }


def _reproducible(page: str, path: Path) -> str:
    """A page that is equal for equal results and works offline.

    Removes the load time, numbers the random anchors, and links the local copy of the logo instead of the remote one.
    """
    anchors: dict[str, str] = {}
    page = REMOTE_LOGO.sub(rf"{'../' * (len(path.parts) - 1)}static/images/\1", page)
    page = LOAD_TIME.sub(f"{NO_TIME:%Y%m%dT%H%M%S.%fZ}", page)
    return RANDOM_ANCHOR.sub(lambda found: anchors.setdefault(found[0], str(len(anchors))), page)


def _finding(gate: Gate, result: Any, is_warning: bool) -> Finding:  # Great Expectations is not typed
    _require_run(gate, result)
    found = result.result
    rows = found.get("partial_unexpected_index_list") or []
    return Finding(
        gate,
        bool(result.success),
        found.get("unexpected_count", 0),
        [str(row["key"]) for row in rows],
        _observed(found),
        "warning" if is_warning else "failure",
    )


def _joined(gate: Gate, parts: Sequence[Any], is_warning: bool) -> Finding:
    """Return the finding of a gate over all parts of a table: what holds for their rows together."""
    for part in parts:
        _require_run(gate, part)
    found = [part.result for part in parts]
    unexpected, offenders = 0, list[str]()
    if "unexpected_count" in found[0]:
        unexpected = sum(part["unexpected_count"] for part in found)
        total = sum(part["element_count"] for part in found)
        mostly = gate.arguments.get("mostly", 1.0)
        assert isinstance(mostly, float), "a share"
        success = not unexpected or (total - unexpected) / total >= mostly
        offenders = [str(row["key"]) for part in found for row in part.get("partial_unexpected_index_list") or []]
        observed = f"{unexpected} of {total} rows"
    elif gate.type == "ExpectTableRowCountToBeBetween":
        count = sum(part["observed_value"] for part in found)
        success, observed = count >= cast("int", gate.arguments["min_value"]), str(count)
    else:
        assert gate.type == "ExpectColumnDistinctValuesToContainSet", f"no rule joins the parts of {gate.type}"
        missing = set.intersection(*(set(part["partial_missing_list"]) for part in found))
        success, observed = not missing, str(found[0]["observed_value"])
    return Finding(gate, success, unexpected, offenders, observed, "warning" if is_warning else "failure")


def _require_run(gate: Gate, result: Any) -> None:  # Great Expectations is not typed
    if result.exception_info.get("raised_exception"):
        raise RuntimeError(f"{gate.type} could not be run: {result.exception_info['exception_message']}")


def _observed(found: Mapping[str, object]) -> str:
    """The observed value of a result, or the number of rows that violate the expectation."""
    if "unexpected_count" in found:
        return f"{found['unexpected_count']} of {found['element_count']} rows"
    value = found.get("observed_value")
    return f"{value:.4g}" if isinstance(value, float) else str(value)
