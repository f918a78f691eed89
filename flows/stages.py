"""The one task that runs a stage, used by every flow, and the tasks that are no stage: a command, a push."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from uuid import UUID

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State

from flows import cancelling, devices, dvc, repro, schedule
from flows.place import Place
from tasks.params.redaction import redacted
from tasks.runtime.errors import StageError

NETWORK_RETRY_SECONDS = (10, 60)
CACHED, NOT_REACHED = "Cached", "not reached"
LEVELS = ((re.compile(r"[\w-]+: error: |ERROR: "), logging.ERROR), (re.compile(r"[\w-]+: warning: "), logging.WARNING))
"""How a line of a stage's output begins -> the level at which it is logged; all others are INFO."""


@dataclass
class Stages:
    """What became of the stages of a flow run."""

    names: tuple[str, ...]
    """In the order in which they are listed."""
    states: dict[str, State[None]] = field(default_factory=dict)
    """Of those that were reached."""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def rows(self) -> list[dict[str, str]]:
        """The table of stages: stage, result and seconds."""
        return [
            {"stage": name, "result": str(self.states[name].name), "seconds": f"{self.seconds[name]:.1f}"}
            if name in self.states
            else {"stage": name, "result": NOT_REACHED, "seconds": ""}
            for name in self.names
        ]

    @property
    def failure(self) -> str | None:
        """The sentences of the stages that failed; several stages can run at the same time."""
        failed = {name: self.states[name] for name in self.names if not self.finished(name) and name in self.states}
        return "; ".join(state.message or f"{name}: {state.name}" for name, state in failed.items()) or None

    def finished(self, stage: str) -> bool:
        """Whether a stage ran or was up to date."""
        return stage in self.states and self.states[stage].is_completed()

    @property
    def ran(self) -> list[str]:
        """Names of the stages that were not cached."""
        return [name for name in self.names if name in self.states and self.states[name].name != CACHED]


def run_all(
    graph: Mapping[str, Sequence[str]],
    place: Place,
    *,
    jobs: int = 1,
    after: Callable[[str], None] = lambda _: None,
    force: tuple[str, ...] = (),
) -> Stages:
    """Run stages in the order of their dependencies, up to the first that fails.

    Args:
        graph: Stage -> the stages that it depends on.
        place: Where they run.
        jobs: Stages that run at the same time, at most; stages that measure durations run alone.
        after: Called with the name of each stage that succeeded.
        force: Stages that run even if DVC has their results.
    """
    done = Stages(tuple(graph))
    alone, gpu = (repro.marked(place.folder, mark) for mark in ("alone", "gpu"))

    def work(stage: str) -> bool:
        began = time.monotonic()
        cancelling.revive(UUID(flow_run.id))
        # A network may be unreachable for a minute. Every other stage is deterministic and would fail again.
        retries = list(NETWORK_RETRY_SECONDS) if stage == "download" else []
        configured = run_stage.with_options(retries=len(retries), retry_delay_seconds=retries or None)
        state = configured(stage, place, force=stage in force, gpu=stage in gpu, return_state=True)
        done.states[stage], done.seconds[stage] = state, time.monotonic() - began
        if state.is_completed():
            after(stage)
        return state.is_completed()

    with (
        dvc.ordered_lock_file(place.folder, list(graph)),
        cancelling.interrupting(place.stop) as interrupt,
    ):
        schedule.run(graph, work, jobs=jobs, alone=alone, interrupt=interrupt)
    return done


@task(task_run_name="{stage}", cache_policy=NO_CACHE, persist_result=False)
def run_stage(stage: str, place: Place, force: bool = False, gpu: bool = False) -> State[None]:
    """Bring one stage up to date, on a GPU of its own if `gpu`; the state is Completed, Cached or Failed."""
    log = run_log()
    try:
        lent = devices.lent(place.environment, log, place.stop) if gpu else nullcontext(place.environment)
        with lent as variables:
            ran = repro.repro(
                stage,
                place.folder,
                variables,
                log,
                held=place.held,
                wait_seconds=place.wait_seconds,
                stop=place.stop,
                force=force,
            )
    except StageError as error:
        return Failed(message=redacted(str(error)))
    return Completed(message=f"{stage} ran") if ran else Completed(name=CACHED, message=f"{stage} is up to date")


@task(task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def run_command(name: str, command: list[str], place: Place) -> State[None]:
    """Run a command on the leash; the state is Completed with its last line, or Failed with its error."""
    log = run_log()
    kept: list[str] = []
    with dvc.leashed(command, place.environment, folder=place.folder, held=[place.held]) as running:
        for line in repro.lines(running.output):
            kept.append(line)
            log(line)
        code = running.process.wait()
    if code:
        errors = [line for line in kept if line.startswith(f"{name}: error: ")]
        return Failed(message=redacted(errors[-1] if errors else f"{name}: {dvc.error(kept)}"))
    return Completed(message=kept[-1] if kept else f"{name} ended")


def push(place: Place) -> str | None:
    """Push all results and the run-cache to the default DVC remote; returns the reason if that fails.

    Does nothing without a remote. A network may be unreachable for a minute, so that the push is tried three times.
    """
    if repro.remote(place.folder) is None:
        return None
    retries = list(NETWORK_RETRY_SECONDS)
    configured = run_command.with_options(retries=len(retries), retry_delay_seconds=retries)
    state = configured("push", dvc.command("push", "--quiet", "--run-cache"), place, return_state=True)
    return None if state.is_completed() else f"the results were not pushed: {state.message}"


def run_log() -> Callable[[str], None]:
    """A function that logs a line of output in the run of the calling task, at the level of its beginning."""
    logger = get_run_logger()

    def log(line: str) -> None:
        level = next((level for beginning, level in LEVELS if beginning.match(line)), logging.INFO)
        logger.log(level, line)

    return log
