"""The chain as a Prefect flow: every stage of `dvc.yaml` in its order, through DVC, as one generic task.

`python -m flows.pipeline` runs it once; `make serve` runs it on the schedules of `prefect.yaml`.

Stage tasks are called directly, not submitted: the main thread of the flow then waits for the stage, so that a
cancelled flow ends it at once.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from uuid import UUID

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelled, Completed, Failed, State

from flows import artifacts, cancelling, clone, repro
from tasks.params import ParamsError
from tasks.params import composition as presets
from tasks.params.redaction import redacted
from tasks.runtime import local_source
from tasks.runtime import workspace as places
from tasks.runtime.errors import StageError

DOWNLOAD_RETRY_SECONDS = (10, 60)
CACHED, NOT_REACHED = "Cached", "not reached"
LEVELS = ((re.compile(r"[\w-]+: error: |ERROR: "), logging.ERROR), (re.compile(r"[\w-]+: warning: "), logging.WARNING))
"""How a line of a stage's output begins -> the level at which it is logged; all others are INFO."""
WRITTEN_FROM = re.compile(r"# Written by `python -m tasks\.preset ([\w-]+)")

COMMITTED = "params.yaml"
"""The entry for the committed params.yaml in the list of presets."""

if TYPE_CHECKING:
    Preset = str
else:
    Preset = Literal[(COMMITTED, *presets.names())]  # Prefect's form makes a drop-down of it


@dataclass(frozen=True)
class Place:
    """Where a flow works, and the environment of its stages."""

    folder: Path
    environment: dict[str, str]
    held: int
    """Descriptor of the workspace's lock."""
    wait_seconds: float


def _run_name() -> str:
    """Name of the flow run: its preset and its scheduled start."""
    preset = flow_run.parameters["preset"]
    if preset == COMMITTED:
        in_clone = flow_run.parameters.get("workspace") or deployment.name
        found = WRITTEN_FROM.match(clone.committed_params(places.root()) if in_clone else _own_params())
        preset = found[1] if found else COMMITTED
    return f"{preset} {flow_run.scheduled_start_time:%Y-%m-%d %H:%M}"


def _own_params() -> str:
    path = places.root() / "params.yaml"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


@flow(name="afterimage", flow_run_name=_run_name)
def pipeline(
    workspace: str | None = None,
    preset: Preset = COMMITTED,
    overrides: list[str] | None = None,
    wait_seconds: float = 3600.0,
) -> State[None]:
    """Bring the whole chain up to date.

    Args:
        workspace: Name of the clone to work in; it follows the commit that the work tree has checked out. Leave it
            out to use the deployment's name. A run without a deployment works in the work tree itself.
        preset: Preset to run; `params.yaml` is the committed file.
        overrides: Parameters that differ from the preset, one `section.key=value` each, such as `train.steps=1000`.
        wait_seconds: Seconds to wait for another run in the same workspace before this one fails.
    """
    with cancelling.obeyed(UUID(flow_run.id)) as cancelled:
        try:
            with _place(workspace, None if preset == COMMITTED else preset, overrides or [], wait_seconds) as place:
                state = _chain(place)
        except (StageError, ParamsError) as error:
            state = Failed(message=redacted(str(error)))
    return Cancelled(message="ended by the run itself") if cancelled.is_set() else state


def _chain(place: Place) -> State[None]:
    """Run every stage in its order, up to the first that fails."""
    local_source.require_hashable(place.folder)
    stages = repro.stages(place.folder)
    table: list[dict[str, str]] = []
    for number, stage in enumerate(stages):
        began = time.monotonic()
        # A network may be unreachable for a minute. Every other stage is deterministic and would fail again.
        retries = list(DOWNLOAD_RETRY_SECONDS) if stage == "download" else []
        configured = run_stage.with_options(retries=len(retries), retry_delay_seconds=retries or None)
        state = configured(stage, place, return_state=True)
        table.append({"stage": stage, "result": state.name, "seconds": f"{time.monotonic() - began:.1f}"})
        if not state.is_completed():
            reason = state.message or f"{stage}: {state.name}"
            table += [{"stage": later, "result": NOT_REACHED, "seconds": ""} for later in stages[number + 1 :]]
            artifacts.publish_stages(table)
            artifacts.publish_failure(reason, place.folder)
            return Failed(message=reason)
        artifacts.publish(stage, place.folder)
    artifacts.publish_stages(table)
    ran = [row["stage"] for row in table if row["result"] != CACHED]
    summary = f"ran {', '.join(ran) or 'nothing'}; {len(table) - len(ran)} of {len(table)} stages cached"
    standing = artifacts.publish_standing(place.folder)
    return Completed(message=f"{standing}; {summary}" if standing else summary)


@task(task_run_name="{stage}", cache_policy=NO_CACHE, persist_result=False)
def run_stage(stage: str, place: Place) -> State[None]:
    """Bring one stage up to date; the state is Completed, Cached or Failed, with one sentence."""
    logger = get_run_logger()

    def log(line: str) -> None:
        logger.log(level(line), line)

    try:
        ran = repro.repro(stage, place.folder, place.environment, log, held=place.held, wait_seconds=place.wait_seconds)
    except StageError as error:
        return Failed(message=redacted(str(error)))
    return Completed(message=f"{stage} ran") if ran else Completed(name=CACHED, message=f"{stage} is up to date")


def level(line: str) -> int:
    """The level at which a line of output is logged."""
    return next((level for beginning, level in LEVELS if beginning.match(line)), logging.INFO)


@contextmanager
def _place(workspace: str | None, preset: str | None, overrides: list[str], wait_seconds: float) -> Iterator[Place]:
    """Yield the work tree or an updated clone of it, locked against other runs."""
    log = get_run_logger().info
    root = places.root()
    workspace = workspace or deployment.name
    if workspace is None and (preset or overrides):
        raise StageError(
            "preset and overrides need a clone, so that your params.yaml is not rewritten; give a workspace as well"
        )
    folder = clone.folder(root, workspace) if workspace else root
    with clone.only_run(folder, f"flow run {flow_run.name}", wait_seconds, log) as held:
        if workspace:
            clone.update(root, folder, preset, overrides, log)
        yield Place(folder, environment(), held, wait_seconds)


def environment() -> dict[str, str]:
    """Environment of a stage: the stores of the main work tree, also in a clone, and the id of the flow run."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONUNBUFFERED": "1",
        "MLFLOW_TRACKING_URI": places.tracking_uri(),
        "AFTERIMAGE_SCRATCH": str(places.scratch()),
        "AFTERIMAGE_FLOW_RUN_ID": str(flow_run.id),
    }
