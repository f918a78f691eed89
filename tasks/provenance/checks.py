"""The result of verifying a model version: a tree of checks, printed with a tick or a cross for each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.json_files import JsonObject

MARKS = {True: "✓", False: "✗", None: "-"}
PLAIN = {True: "ok", False: "FAILED", None: "skipped"}
"""The marks of terminals whose encoding lacks the others."""


@dataclass
class Check:
    """One check and those below it."""

    name: str
    ok: bool | None
    """None if there is nothing to check, or no way to do so from here; `detail` says which."""
    detail: str
    below: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether neither this check nor one below it failed."""
        return self.ok is not False and all(check.passed for check in self.below)

    def failures(self) -> Iterator[Check]:
        """Yield every failed check, in the order of the tree."""
        if self.ok is False:
            yield self
        for check in self.below:
            yield from check.failures()

    def to_json(self) -> JsonObject:
        """Return the tree as nested objects."""
        return {
            "name": self.name,
            "ok": self.ok,
            "detail": self.detail,
            "below": [check.to_json() for check in self.below],
        }


def lines(check: Check, encoding: str = "utf-8") -> Iterator[str]:
    """Yield the tree as lines of text, with ASCII marks if `encoding` lacks the usual ones."""
    try:
        "✓✗├─└│".encode(encoding)
        yield from _lines(check, MARKS, ("├─ ", "│  ", "└─ "))
    except UnicodeEncodeError:
        yield from _lines(check, PLAIN, ("|- ", "|  ", "`- "))


def _lines(check: Check, marks: dict[bool | None, str], branches: tuple[str, str, str]) -> Iterator[str]:
    yield f"{marks[check.ok]} {check.name}: {check.detail}"
    middle, beside, last = branches
    for number, lower in enumerate(check.below, 1):
        is_last = number == len(check.below)
        for position, line in enumerate(_lines(lower, marks, branches)):
            first = last if is_last else middle
            yield (first if position == 0 else "   " if is_last else beside) + line
