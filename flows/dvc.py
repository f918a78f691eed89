"""DVC as a process: its command line, a leash that ends it and its stages, what its output says, and its lock file."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO

from tasks.runtime import atomic, leash


class Outcome(StrEnum):
    """What DVC did with a stage."""

    RAN = "ran"
    CACHED = "cached"
    UNCHANGED = "unchanged"


# All that DVC prints to distinguish a stage that it runs from one whose results it has.
_OUTCOMES = (
    (re.compile(r"Running stage '([^']+)'"), Outcome.RAN),
    (re.compile(r"Stage '([^']+)' is cached - skipping run"), Outcome.CACHED),
    (re.compile(r"Stage '([^']+)' didn't change, skipping"), Outcome.UNCHANGED),
)


def command(*arguments: str) -> list[str]:
    """The command line of this environment's DVC."""
    return [sys.executable, "-m", "dvc", *arguments]


def outcome(line: str) -> tuple[str, Outcome] | None:
    """The stage that a line of `dvc repro` announces and its outcome; None for any other line."""
    for pattern, found in _OUTCOMES:
        if match := pattern.match(line):
            return match[1], found
    return None


def error(output: Sequence[str]) -> str:
    """The last error in lines of DVC's output, or else the last line."""
    errors = [line.removeprefix("ERROR: ") for line in output if line.startswith("ERROR: ")]
    return errors[-1] if errors else (output[-1] if output else "no reason given")


_ENTRIES = re.compile(r"(?<=^stages:\n)(?: .*\n)+", re.MULTILINE)
_ENTRY = re.compile(r"^  (\S.*):\n(?:    .*\n)+", re.MULTILINE)


@contextmanager
def ordered_lock_file(folder: Path, stages: Sequence[str]) -> Iterator[None]:
    """Keep the order of the entries in `dvc.lock` while stages run in the block.

    DVC appends the entry of a new stage when the stage ends. At the end of the block, entries that were there before
    come first, in their order, and new ones follow in the order of `stages`, so that the file does not depend on which
    of two stages ended first. No DVC command may run at that time.
    """
    file = folder / "dvc.lock"
    known = list(_entries(file)[1])
    try:
        yield
    finally:
        text, entries = _entries(file)
        rank = {name: number for number, name in enumerate(dict.fromkeys([*known, *stages, *entries]))}
        ordered = "".join(entries[name] for name in sorted(entries, key=rank.__getitem__))
        if (old := "".join(entries.values())) != ordered:
            atomic.write_text(file, text.replace(old, ordered))


def _entries(file: Path) -> tuple[str, dict[str, str]]:
    """Text of a `dvc.lock`, and stage -> the lines of its entry; both empty if there is no file."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = _ENTRIES.search(text)
    return text, {entry[1]: entry[0] for entry in _ENTRY.finditer(found[0])} if found else {}


@dataclass(frozen=True)
class Leashed:
    """A process on the leash of `tasks/runtime/leash.py`."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]
    """Its standard output and standard error, also those of the processes below it."""
    leash: IO[bytes]

    def end(self) -> None:
        """Close the leash, which ends the process and all below it; what they still print comes through `output`."""
        self.leash.close()


@contextmanager
def leashed(
    command: Sequence[str], environment: Mapping[str, str], *, folder: Path | None = None, held: Sequence[int] = ()
) -> Iterator[Leashed]:
    """Run `command` on a leash that the end of the block closes, and so does the end of this process.

    Args:
        command: Program and arguments.
        environment: All variables of the process.
        folder: Working directory; by default the present one.
        held: Descriptors that the process and all below it keep open, such as that of a lock.
    """
    process = subprocess.Popen(
        leash.command_line(command),
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=tuple(held),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    running = Leashed(process, process.stdout, process.stdin)
    try:
        yield running
    finally:
        running.end()
        process.wait()
        process.stdout.close()
