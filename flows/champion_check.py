"""The scheduled check of the champion: measure it and the challenger again on the data that the source has now."""

from __future__ import annotations

import sys
from uuid import UUID

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed, State

from flows import artifacts, cancelling, repro, stages
from flows.place import Place, opened
from tasks.params import ParamsError
from tasks.params.redaction import redacted
from tasks.runtime import local_source
from tasks.runtime.errors import StageError

JUDGE = "judge"


@flow(name="afterimage-champion-check")
def champion_check(workspace: str | None = None, wait_seconds: float = 3600.0) -> State[None]:
    """Promote the challenger if it beats the champion under one protocol, on present data; report the reason if not.

    Args:
        workspace: Name of the clone to work in. Leave it out to use the deployment's name.
        wait_seconds: Seconds to wait for another run in the same workspace before this one fails.
    """
    with cancelling.obeyed(UUID(flow_run.id)) as cancelled:
        try:
            with opened(workspace, None, [], wait_seconds, cancelled) as place:
                state = _check(place)
        except (StageError, ParamsError) as error:
            state = Failed(message=redacted(str(error)))
    return Cancelled(message="ended by the run itself") if cancelled.is_set() else state


def _check(place: Place) -> State[None]:
    local_source.require_hashable(place.folder)
    done = stages.run_all(repro.upstream(place.folder, JUDGE), place)
    artifacts.publish_stages(done.rows)
    if done.failure:
        return Failed(message=done.failure)
    command = [sys.executable, "-m", "tasks.champion_check"]
    state = stages.run_command("champion_check", command, place, return_state=True)
    text = str(state.message)
    create_markdown_artifact(text, key="champion-check", description="Decision on champion and challenger")
    return Completed(message=text) if state.is_completed() else Failed(message=text)
