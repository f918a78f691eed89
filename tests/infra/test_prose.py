"""The vocabulary check of `make lint`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from infra import prose

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("the network is told a label", "told"),
        ("def memory_told():", "told"),
        ("a low-rank addition", "low-rank addition"),
        ("works\nwhere there is no GPU", "where there is no"),
    ],
)
def test_a_listed_phrase_is_found(text, found):
    findings = list(prose.check(Path("x.md"), text))
    assert [finding.found for finding in findings] == [found]
    assert findings[0].line == text.count("\n") + 1


def test_a_part_of_another_word_is_not_found():
    assert not list(prose.check(Path("x.md"), "an apartment in Whistler, beside the storyteller"))


def test_the_project_uses_none_of_the_phrases():
    done = subprocess.run([sys.executable, "-m", "infra.prose"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
