"""Check the vocabulary of code and documentation against a list of phrases that are hard to read.

    python -m infra.prose [FILE ...]

Without arguments every text file that Git tracks is checked. `make lint` runs this after codespell, which finds
misspelled words; this finds correctly spelled ones that CONTRIBUTING.md asks to avoid.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".html", ".cff", ".in"}
UNCHECKED = {"infra/prose.py", "tests/infra/test_prose.py"}
"""Files that must contain the phrases."""


class Phrase(NamedTuple):
    """A regular expression, and what to write instead."""

    pattern: str
    instead: str


PHRASES = (
    Phrase(r"told|(?<!\.)tells?|telling", "say who reads or receives what, such as 'the network is conditioned on'"),
    Phrase(r"where there (is|are|was|were)( no)?", "'if there is', 'without' or 'with'"),
    Phrase(r"low-rank additions?", "'LoRA adapter'"),
    Phrase(r"from which on|up to which", "a plain limit, such as 'at least' or 'the largest'"),
    Phrase(r"(that|lets) nobody", "'undeclared', 'unknown', or 'does not support'"),
    Phrase(r"wish|wishes|wished", "'request' or 'parameter'"),
    Phrase(r"(set|put|lay|left|laid) aside|asides?", "'quarantine', 'separate' or 'temporary'"),
    Phrase(r"apart", "'except', 'separate' or 'different'"),
    Phrase(r"its business|whose business", "name what depends on what"),
    Phrase(r"knows? (nothing|no) (of|about)", "'does not use' or 'does not import'"),
    Phrase(r"without a word|in silence", "'without a message'"),
    Phrase(r"behind (its|his|the person's) back", "'without DVC's knowledge' or 'unnoticed'"),
)


class Finding(NamedTuple):
    """A phrase in a file."""

    file: Path
    line: int
    found: str
    instead: str


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.prose", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: every tracked text file")
    files = parser.parse_args().files or list(tracked())
    findings = [finding for file in files for finding in check(file, file.read_text(encoding="utf-8"))]
    for finding in findings:
        print(f"{finding.file}:{finding.line}: '{finding.found}'; write {finding.instead}")
    print(f"prose: {len(findings)} phrases to rewrite in {len(files)} files")
    return 1 if findings else 0


def tracked() -> Iterator[Path]:
    """Text files that Git tracks, without those of UNCHECKED."""
    listed = subprocess.run(["git", "ls-files", "-z"], check=True, capture_output=True, text=True).stdout
    for name in listed.split("\0"):
        path = Path(name)
        if name and name not in UNCHECKED and path.suffix in SUFFIXES and path.is_file():
            yield path


def check(file: Path, text: str, phrases: Iterable[Phrase] = PHRASES) -> Iterator[Finding]:
    """Every use of a phrase in `text`, also as a part of an identifier such as `memory_told`."""
    for phrase in phrases:
        for found in re.finditer(rf"(?<![A-Za-z])(?:{phrase.pattern})(?![A-Za-z])", text, re.IGNORECASE):
            yield Finding(file, text.count("\n", 0, found.start()) + 1, found.group(), phrase.instead)


if __name__ == "__main__":
    sys.exit(main())
