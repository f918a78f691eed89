"""Gates and their results as typed values, and the file `reports/validation/findings.json` that stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from models.json_files import Description, JsonObject
from tasks.runtime import integrity

FILE = "findings.json"
Argument: TypeAlias = str | float | list[str] | None
"""A value that an expectation accepts."""


@dataclass(frozen=True)
class Gate:
    """One expectation about a table, and what to do if it fails."""

    check: str
    """Name of the check, such as "size". Several gates may belong to one check; `validate.warn_only` lists checks."""
    type: str
    """Class name of the expectation in Great Expectations, such as "ExpectColumnValuesToBeBetween"."""
    arguments: Mapping[str, Argument]
    complaint: str
    """What is wrong and what to do, shown if the gate fails."""
    note: str = ""
    """Information about the data that is shown whether or not the gate holds, such as a number of enlarged images."""


@dataclass(frozen=True)
class Finding:
    """Result of one gate."""

    gate: Gate
    success: bool
    unexpected: int
    """Rows that violate the expectation; a gate with a tolerance may hold nevertheless."""
    offenders: list[str]
    """Keys of the first of these rows."""
    observed: str
    """The observed value, or the number of violating rows."""
    severity: Literal["warning", "failure"] = "failure"
    """What a failure of the gate means: a warning for the checks in `validate.warn_only`."""

    @property
    def verdict(self) -> Literal["holds", "warning", "refused"]:
        if self.success:
            return "holds"
        return "warning" if self.severity == "warning" else "refused"


@dataclass(frozen=True)
class Findings(Description):
    """Content of `findings.json`."""

    FORMAT = 1
    REMEDY = integrity.remedy("validate")

    findings: list[Finding]
    quarantined: dict[str, int]
    """Number of quarantined inputs by reason."""

    @classmethod
    def from_json(cls, values: JsonObject) -> Findings:
        found = [Finding(**{**value, "gate": Gate(**value["gate"])}) for value in values["findings"]]
        return cls(found, values["quarantined"])
