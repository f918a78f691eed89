"""The chain as a Prefect flow: every stage of `dvc.yaml` in its order, through DVC, as one generic task.

    python -m flows.pipeline [--workspace NAME [--preset NAME] [key=value ...]]

Stage tasks are called directly, not submitted: the flow's main thread then waits for the stage, so that a
cancelled flow ends it at once.
"""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported, which takes a while and reads the environment
    from flows import once

    once.main()
    raise SystemExit

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import deployment, flow_run
from prefect.states import Completed, Failed, State

from flows import artifacts, clone, repro
from tasks.params import ParamsError
from tasks.runtime import workspace as places
from tasks.runtime.stage import StageError

DOWNLOAD_RETRY_SECONDS = (10, 60)
CACHED = "Cached"


@dataclass(frozen=True)
class Place:
    """Where a flow works, and what its stages see."""

    folder: Path
    environment: dict[str, str]
    held: int
    """Descriptor of the workspace's lock."""
    wait_seconds: float


@flow(name="afterimage")
def pipeline(
    workspace: str | None = None,
    preset: str | None = None,
    overrides: list[str] | None = None,
    wait_seconds: float = 3600.0,
) -> State[Any]:
    """Bring the whole chain up to date.

    workspace: name of the clone to work in, made or updated to the commit that the work tree has checked out.
        null is the deployment's name; a run without a deployment works in the work tree itself, on its files as
        they are.
    preset, overrides: parameters of a clone (`key=value`); null and nothing mean the committed params.yaml.
    wait_seconds: how long to wait for another run in the same workspace.
    """
    try:
        with _place(workspace, preset, overrides or [], wait_seconds) as place:
            return _chain(place)
    except (StageError, ParamsError) as error:
        return Failed(message=str(error))


def _chain(place: Place) -> State[Any]:
    """Every stage in its order; ends with the first that fails."""
    table: list[dict[str, str]] = []
    for stage in repro.stages(place.folder):
        began = time.monotonic()
        # A download may meet a network that is away for a minute; what another stage does wrong it does again.
        retries = list(DOWNLOAD_RETRY_SECONDS) if stage == "download" else []
        configured = run_stage.with_options(retries=len(retries), retry_delay_seconds=retries or None)
        state = configured(stage, place, return_state=True)
        if not state.is_completed():
            return Failed(message=state.message or f"{stage}: {state.name}")
        table.append({"stage": stage, "result": state.name, "seconds": f"{time.monotonic() - began:.1f}"})
        artifacts.publish(stage, place.folder)
    artifacts.publish_stages(table)
    ran = [row["stage"] for row in table if row["result"] != CACHED]
    return Completed(
        message=f"ran {', '.join(ran) or 'nothing'}; {len(table) - len(ran)} of {len(table)} stages cached"
    )


@task(task_run_name="{stage}", cache_policy=NO_CACHE, persist_result=False)
def run_stage(stage: str, place: Place) -> State[Any]:
    """Bring one stage up to date by `dvc repro --single-item`; Completed, Cached or Failed, with one sentence."""
    log = get_run_logger().info
    try:
        ran = repro.repro(stage, place.folder, place.environment, log, held=place.held, wait_seconds=place.wait_seconds)
    except StageError as error:
        return Failed(message=str(error))
    return Completed(message=f"{stage} ran") if ran else Completed(name=CACHED, message=f"{stage} is up to date")


@contextmanager
def _place(workspace: str | None, preset: str | None, overrides: list[str], wait_seconds: float) -> Iterator[Place]:
    """The work tree or an updated clone of it, with no other run in it."""
    log = get_run_logger().info
    root = places.root()
    workspace = workspace or deployment.name
    if workspace is None and (preset or overrides):
        raise StageError(
            "preset and overrides are for a clone, so that no params.yaml of yours is rewritten; name a workspace too"
        )
    folder = clone.folder(root, workspace) if workspace else root
    with clone.only_run(folder, f"flow run {flow_run.name}", wait_seconds, log) as held:
        if workspace:
            clone.update(root, folder, preset, overrides, log)
        yield Place(folder, _environment(), held, wait_seconds)


def _environment() -> dict[str, str]:
    """What a stage sees: the stores of the main work tree, also from a clone, and who called."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONUNBUFFERED": "1",
        "MLFLOW_TRACKING_URI": places.tracking_uri(),
        "AFTERIMAGE_SCRATCH": str(places.scratch()),
        "AFTERIMAGE_FLOW_RUN_ID": str(flow_run.id),
    }
