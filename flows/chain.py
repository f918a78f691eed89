"""The chain as a Prefect flow: every stage of `dvc.yaml`, through DVC, as one generic task.

`python -m flows.pipeline` runs it once; `make serve` runs it on the schedules of `prefect.yaml`.

Independent stages can run at the same time, each in a thread (`flows/schedule.py`); any other stage is called directly
by the main thread of the flow.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Literal
from uuid import UUID

from prefect import flow
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelled, Completed, Failed, State

from flows import artifacts, cancelling, clone, repro, schedule, stages
from flows.place import Place, opened
from tasks.params import ParamsError
from tasks.params import composition as presets
from tasks.params.redaction import redacted
from tasks.runtime import local_source
from tasks.runtime import workspace as places
from tasks.runtime.errors import StageError

WRITTEN_FROM = re.compile(r"# Written by `python -m tasks\.preset ([\w-]+)")

COMMITTED = "params.yaml"
"""The entry for the committed params.yaml in the list of presets."""

if TYPE_CHECKING:
    Preset = str
else:
    Preset = Literal[(COMMITTED, *presets.names())]  # Prefect's form makes a drop-down of it


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
    jobs: int = schedule.JOBS,
) -> State[None]:
    """Bring the whole chain up to date.

    Args:
        workspace: Name of the clone to work in; it follows the commit that the work tree has checked out. Leave it
            out to use the deployment's name. A run without a deployment works in the work tree itself.
        preset: Preset to run; `params.yaml` is the committed file.
        overrides: Parameters that differ from the preset, one `section.key=value` each, such as `train.steps=1000`.
        wait_seconds: Seconds to wait for another run in the same workspace before this one fails.
        jobs: Independent stages that run at the same time. Their results are the same; with a GPU, both need memory.
    """
    with cancelling.obeyed(UUID(flow_run.id)) as cancelled:
        try:
            chosen = None if preset == COMMITTED else preset
            with opened(workspace, chosen, overrides or [], wait_seconds, cancelled) as place:
                state = _chain(place, jobs)
        except (StageError, ParamsError) as error:
            state = Failed(message=redacted(str(error)))
    return Cancelled(message="ended by the run itself") if cancelled.is_set() else state


def _chain(place: Place, jobs: int) -> State[None]:
    """Run every stage, up to the first that fails; then push what was computed, and keep its record."""
    local_source.require_hashable(place.folder)
    publish = partial(artifacts.publish, folder=place.folder)
    done = stages.run_all(repro.graph(place.folder), place, jobs=jobs, after=publish)
    artifacts.publish_stages(done.rows)
    unpushed = stages.push(place)
    artifacts.keep_record(place.folder, str(flow_run.id), trained=done.finished("train"))
    if done.failure:
        artifacts.publish_failure(done.failure, place.folder)
        return Failed(message=done.failure)
    summary = (
        f"ran {', '.join(done.ran) or 'nothing'}; {len(done.rows) - len(done.ran)} of {len(done.rows)} stages cached"
    )
    standing = artifacts.publish_standing(place.folder)
    message = f"{standing}; {summary}" if standing else summary
    return Failed(message=f"{unpushed}; {message}") if unpushed else Completed(message=message)
