"""Fetch and validate the source again, and run the chain only if its data changed."""

from __future__ import annotations

import json
from pathlib import Path
from uuid import UUID

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.deployments import run_deployment
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed, State

from flows import artifacts, cancelling, repro, stages
from flows.place import Place, opened
from tasks import params
from tasks.params import ParamsError
from tasks.params.redaction import redacted
from tasks.runtime import local_source, tracking
from tasks.runtime.errors import StageError

VALIDATE = "validate"
FETCH = ("download",)
"""Stages that run although DVC has their results."""
DATA_TAG = "afterimage.data_sha256"
SHORT = 12


@flow(name="afterimage-data-refresh")
def data_refresh(
    workspace: str | None = None, pipeline: str = "afterimage/on-demand", wait_seconds: float = 3600.0
) -> State[None]:
    """Fetch the source again; start the chain if its images differ from those of the last registered version.

    Args:
        workspace: Name of the clone to work in. Leave it out to use the deployment's name.
        pipeline: Deployment to start when the data changed, as FLOW/DEPLOYMENT.
        wait_seconds: Seconds to wait for another run in the same workspace before this one fails.
    """
    with cancelling.obeyed(UUID(flow_run.id)) as cancelled:
        try:
            with opened(workspace, None, [], wait_seconds, cancelled) as place:
                state = _refresh(place, pipeline)
        except (StageError, ParamsError) as error:
            state = Failed(message=redacted(str(error)))
    return Cancelled(message="ended by the run itself") if cancelled.is_set() else state


def _refresh(place: Place, pipeline: str) -> State[None]:
    local_source.require_hashable(place.folder)
    done = stages.run_all(repro.upstream(place.folder, VALIDATE), place, force=FETCH)
    artifacts.publish_stages(done.rows)
    if done.failure:
        return Failed(message=done.failure)
    found, (version, known) = data_hash(place.folder), registered_hash(place.folder)
    rows = [{"data": "of the source now", "sha256": found}, {"data": f"of {version}", "sha256": known or "none"}]
    create_table_artifact(rows, key="data", description="Equal hashes: nothing to do")
    if found == known:
        return Completed(message=f"data {found[:SHORT]} is that of {version}; nothing to do", name="Unchanged")
    started = run_deployment(pipeline, timeout=0, as_subflow=False)
    return Completed(message=f"data {found[:SHORT]} is not that of {version}; started {pipeline} as '{started.name}'")


def data_hash(folder: Path) -> str:
    """Hash of the ingested images, which is also a tag of each version that was trained on them."""
    index = json.loads((folder / "data" / "images" / "index.json").read_text(encoding="utf-8"))
    return str(index["sha256"])


def registered_hash(folder: Path) -> tuple[str, str | None]:
    """Name of the challenger of this workspace's model, and the hash of its data; None if there is none."""
    name = params.load(folder / "params.yaml").register_.model_name
    client = tracking.connect()
    found = client.search_registered_models(f"name = '{name}'")
    number = found[0].aliases.get(tracking.CHALLENGER) if found else None
    if number is None:
        return f"{name}, which has no version", None
    return f"{name} version {number}", client.get_model_version(name, str(number)).tags.get(DATA_TAG)
