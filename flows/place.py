"""Where a flow works: the work tree or a clone, locked against other runs, and the environment of its stages."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from prefect import get_run_logger
from prefect.runtime import deployment, flow_run

from flows import clone, recover, repro
from tasks.runtime import workspace as places
from tasks.runtime.errors import StageError


@dataclass(frozen=True)
class Place:
    """Where a flow works, and the environment of its stages."""

    folder: Path
    environment: dict[str, str]
    held: int
    """Descriptor of the workspace's lock."""
    wait_seconds: float
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when the flow run is being cancelled."""


@contextmanager
def opened(
    workspace: str | None, preset: str | None, overrides: list[str], wait_seconds: float, stop: threading.Event
) -> Iterator[Place]:
    """Yield the work tree or an updated clone of it, locked against other runs.

    Args:
        workspace: Name of the clone; None uses the deployment's name, or without a deployment the work tree itself.
        preset: Preset to compose in the clone; None uses the committed `params.yaml`.
        overrides: Parameters that differ from the preset, `section.key=value`.
        wait_seconds: Limit of the waiting for another run.
        stop: Set when the flow run is being cancelled.
    """
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
        for repair in recover.recover(folder):
            log(repair)
        yield Place(folder, environment(), held, wait_seconds, stop)


def environment() -> dict[str, str]:
    """Environment of a stage: the stores of the main work tree, also in a clone, and the id of the flow run.

    A work tree without any results of its own, as in the clone of one run on another machine, takes those that it needs
    from the default DVC remote. Elsewhere a stage does not depend on the remote.
    """
    pull = {repro.PULL: "true"} if _lacks_results(places.root()) else {}
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONUNBUFFERED": "1",
        "MLFLOW_TRACKING_URI": places.tracking_uri(),
        "AFTERIMAGE_SCRATCH": str(places.scratch()),
        "AFTERIMAGE_FLOW_RUN_ID": str(flow_run.id),
        **pull,
    }


def _lacks_results(root: Path) -> bool:
    return repro.remote(root) is not None and not (clone.cache(root) / "files").exists()
