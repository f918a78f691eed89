"""One stage at a time through `dvc repro --single-item`, as a process on a leash whose output is read live."""

from __future__ import annotations

import codecs
import graphlib
import os
import re
import subprocess
import sys
import time
import typing
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from tasks.params.redaction import redacted
from tasks.runtime.stage import StageError

LEASH = Path(__file__).with_name("leash.py")
PROGRESS_SECONDS = 5.0
BUSY_SECONDS = 5.0
MEMORY_LINES = 30

# What DVC prints, and all that tells a stage that ran from one that did not.
_SKIPPED = re.compile(r"didn't change, skipping|is cached - skipping run")
_BUSY = re.compile(r"Unable to acquire lock|is busy, it is being blocked by")
_ADVICE = re.compile(r"To track the changes with git|git add |To enable auto staging|dvc config core\.|Use `dvc push`")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def dvc(*arguments: str) -> list[str]:
    """The command line of this environment's DVC."""
    return [sys.executable, "-m", "dvc", *arguments]


def stages(workspace: Path) -> list[str]:
    """Stages of `workspace` in an order in which each comes after all it depends on, as DVC sees them."""
    return list(graph(workspace))


def graph(workspace: Path) -> dict[str, list[str]]:
    """Stage -> the stages whose outputs it reads, sorted; each stage comes after all it depends on."""
    command = dvc("dag", "--dot")
    done = subprocess.run(command, cwd=workspace, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageError(f"DVC cannot read the chain in {workspace}: {_dvc_error(done.stderr.splitlines())}")
    upstream: dict[str, set[str]] = {}
    for line in done.stdout.splitlines():
        names = re.findall(r'"([^"]+)"', line)
        for name in names:
            upstream.setdefault(name, set())
        if len(names) == 2:  # "upstream" -> "downstream";
            upstream[names[1]].add(names[0])
    order = graphlib.TopologicalSorter({name: sorted(upstream[name]) for name in sorted(upstream)})
    return {name: sorted(upstream[name]) for name in order.static_order()}


def repro(
    stage: str,
    workspace: Path,
    environment: Mapping[str, str],
    log: Callable[[str], None],
    *,
    held: int,
    wait_seconds: float,
) -> bool:
    """Bring `stage` up to date in `workspace`; True if it ran, False if DVC found its results.

    Each line of output goes to `log` as it appears, a progress bar every few seconds. `held` is the descriptor
    of the workspace's lock, which the processes keep locked should this one die. While another DVC command
    has the workspace this waits, `wait_seconds` at most. Raises `StageError` with the stage's own sentence.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        memory: deque[str] = deque(maxlen=MEMORY_LINES)
        skipped = False
        process, leash, output = _start(dvc("repro", "--single-item", stage), workspace, environment, held)
        try:
            for line in lines(output):
                skipped = skipped or bool(_SKIPPED.search(line))
                if not _ADVICE.match(line):
                    memory.append(line)
                    log(line)
        finally:  # cancelled, interrupted, or done
            leash.close()
            for line in lines(output):  # last words; a closed pipe would break the saving of a checkpoint
                log(line)
            output.close()
            process.wait()
        if process.returncode == 0:
            return not skipped
        if not any(_BUSY.search(line) for line in memory):
            raise StageError(_reason(stage, memory))
        if time.monotonic() > deadline:
            raise StageError(
                f"{stage}: another DVC command has kept {workspace} for {wait_seconds:.0f} s; end it or wait for it"
            )
        log(f"another DVC command is working in {workspace}; trying again in {BUSY_SECONDS:.0f} s")
        time.sleep(BUSY_SECONDS)


def _start(
    command: list[str], workspace: Path, environment: Mapping[str, str], held: int
) -> tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]:
    """Start `command` on a leash. Returns the process, the leash (closing it, or dying, ends all of its processes)
    and its output."""
    process = subprocess.Popen(
        [sys.executable, "-I", str(LEASH), *command],
        cwd=workspace,
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=(held,),
    )
    return process, typing.cast("IO[bytes]", process.stdin), typing.cast("IO[bytes]", process.stdout)


def lines(stream: IO[bytes]) -> Iterator[str]:
    """Lines as they come, without blank ones and secrets; of a progress bar, which redraws itself, one every few s."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pending, shown = "", -PROGRESS_SECONDS
    while chunk := os.read(stream.fileno(), 65536):
        *whole, pending = re.split(r"(?<=\n)|(?<=\r)(?!\n)", pending + decoder.decode(chunk))
        for text in whole:
            line = redacted(_ESCAPES.sub("", text).strip())
            if not line:
                continue
            if text.endswith("\r"):
                if time.monotonic() - shown < PROGRESS_SECONDS:
                    continue
                shown = time.monotonic()
            yield line
    if line := redacted(_ESCAPES.sub("", pending).strip()):
        yield line


def _reason(stage: str, memory: deque[str]) -> str:
    """The sentence in which the stage, or else DVC, said what is wrong."""
    for line in reversed(memory):
        if line.startswith(f"{stage}: error: "):
            return line
    return f"{stage}: {_dvc_error(memory)}"


def _dvc_error(output: list[str] | deque[str]) -> str:
    errors = [line.removeprefix("ERROR: ") for line in output if line.startswith("ERROR: ")]
    return errors[-1] if errors else (output[-1] if output else "no reason given")
