"""The stages in DVC's order, and running one of them with `dvc repro --single-item` while its output is read."""

from __future__ import annotations

import codecs
import graphlib
import os
import re
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import yaml

from flows import dvc
from tasks.params.redaction import redacted
from tasks.runtime.errors import StageError

PROGRESS_SECONDS = 5.0
BUSY_SECONDS = 5.0
MEMORY_LINES = 30

PULL = "AFTERIMAGE_PULL"
"""Variable in the environment of DVC: results that the cache lacks are taken from the default remote."""

_BUSY = re.compile(r"Unable to acquire lock|is busy, it is being blocked by")
_ADVICE = re.compile(r"To track the changes with git|git add |To enable auto staging|dvc config core\.|Use `dvc push`")
_SENTENCE = re.compile(r"[\w-]+: (?:error: |terminated; )")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def stages(workspace: Path) -> list[str]:
    """Stages of `workspace` in an order in which each comes after all it depends on, as DVC sees them."""
    return list(graph(workspace))


def graph(workspace: Path) -> dict[str, list[str]]:
    """Stage -> the stages whose outputs it reads, sorted; each stage comes after all it depends on.

    Raises `StageError` if DVC cannot read the chain.
    """
    command = dvc.command("dag", "--dot")
    done = subprocess.run(command, cwd=workspace, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageError(f"DVC cannot read the chain in {workspace}: {dvc.error(done.stderr.splitlines())}")
    upstream: dict[str, set[str]] = {}
    for line in done.stdout.splitlines():
        names = re.findall(r'"([^"]+)"', line)
        for name in names:
            upstream.setdefault(name, set())
        if len(names) == 2:  # "upstream" -> "downstream";
            upstream[names[1]].add(names[0])
    order = graphlib.TopologicalSorter({name: sorted(upstream[name]) for name in sorted(upstream)})
    return {name: sorted(upstream[name]) for name in order.static_order()}


def upstream(workspace: Path, stage: str) -> dict[str, list[str]]:
    """The part of `graph` that ends in `stage`: it and all stages that it depends on."""
    stages_of = graph(workspace)
    needed = {stage}
    for name in reversed(stages_of):  # each stage comes after all it depends on
        if name in needed:
            needed.update(stages_of[name])
    return {name: above for name, above in stages_of.items() if name in needed}


def marked(workspace: Path, mark: str) -> set[str]:
    """Stages with `meta: {MARK: true}` in `dvc.yaml`: `alone`, beside which no other may run, and `gpu`."""
    chain = yaml.safe_load((workspace / "dvc.yaml").read_text(encoding="utf-8"))
    return {name for name, stage in chain["stages"].items() if stage.get("meta", {}).get(mark)}


def remote(workspace: Path) -> str | None:
    """Name of the default DVC remote of `workspace`, or None."""
    command = dvc.command("config", "core.remote")
    done = subprocess.run(command, cwd=workspace, capture_output=True, text=True, check=False)
    return (done.stdout.strip() or None) if done.returncode == 0 else None


def repro(
    stage: str,
    workspace: Path,
    environment: Mapping[str, str],
    log: Callable[[str], None],
    *,
    held: int,
    wait_seconds: float,
    stop: threading.Event | None = None,
    force: bool = False,
) -> bool:
    """Bring `stage` alone up to date in `workspace`; True if it ran, False if DVC had its results.

    Waits up to `wait_seconds` while another DVC command works in the workspace. Raises `StageError` with the
    sentence of the stage if it fails.

    Args:
        stage: Name in `dvc.yaml`.
        workspace: Folder of `dvc.yaml`.
        environment: All variables of the stage.
        log: Receives each line of output as it appears, of a progress bar one every few seconds.
        held: Descriptor of the workspace's lock, which the stage keeps locked if this process dies.
        wait_seconds: Limit of the waiting.
        stop: Once it is set, DVC is not started, or not again; `StageError` is raised instead.
        force: Whether the stage runs even if DVC has its results.
    """
    options = ("--single-item", *(["--force"] if force else []), stage)
    return stage in _repro(options, workspace, environment, log, held=held, wait_seconds=wait_seconds, stop=stop)


def repro_with_upstream(
    stages: Sequence[str],
    workspace: Path,
    environment: Mapping[str, str],
    log: Callable[[str], None],
    *,
    held: int,
    wait_seconds: float,
    stop: threading.Event | None = None,
) -> set[str]:
    """Bring `stages` and all that they depend on up to date, by one DVC process; returns the stages that ran.

    The other arguments and the errors are those of `repro`.
    """
    return _repro(tuple(stages), workspace, environment, log, held=held, wait_seconds=wait_seconds, stop=stop)


def _repro(
    options: tuple[str, ...],
    workspace: Path,
    environment: Mapping[str, str],
    log: Callable[[str], None],
    *,
    held: int,
    wait_seconds: float,
    stop: threading.Event | None = None,
) -> set[str]:
    """Run `dvc repro` with `options`, the last of which is a stage; returns the stages that ran."""
    # Without the option, a stage whose command ended while another DVC command had the lock for 3 s would be lost.
    pull = ["--pull"] if PULL in environment else []
    command = dvc.command("--wait-for-lock", "repro", *pull, *options)
    deadline = time.monotonic() + wait_seconds
    stage = options[-1]
    while not (stop and stop.is_set()):
        memory: deque[str] = deque(maxlen=MEMORY_LINES)
        ran: set[str] = set()
        with dvc.leashed(command, environment, folder=workspace, held=[held]) as running:
            try:
                for line in lines(running.output):
                    found = dvc.outcome(line)
                    if found is not None and found[1] == dvc.Outcome.RAN:
                        ran.add(found[0])
                    if not _ADVICE.match(line):
                        memory.append(line)
                        log(line)
            finally:  # cancelled, interrupted, or done
                running.end()
                for line in lines(running.output):  # a closed pipe would break the saving of a checkpoint
                    log(line)
        if running.process.returncode == 0:
            return ran
        if not any(_BUSY.search(line) for line in memory):
            raise StageError(_reason(stage, memory))
        if time.monotonic() > deadline:
            raise StageError(
                f"{stage}: another DVC command has kept {workspace} for {wait_seconds:.0f} s; end it or wait for it"
            )
        log(f"another DVC command is working in {workspace}; trying again in {BUSY_SECONDS:.0f} s")
        time.sleep(BUSY_SECONDS)
    raise StageError(f"{stage}: interrupted before it began")


def lines(stream: IO[bytes]) -> Iterator[str]:
    """Yield lines as they come, without blank ones and secrets; a progress bar, which redraws itself, every few s."""
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


def _reason(stage: str, memory: Sequence[str]) -> str:
    """The error that the stage printed, or else that of DVC, in one sentence."""
    for line in reversed(memory):
        if _SENTENCE.match(line):
            return line
    return f"{stage}: {dvc.error(memory)}"
