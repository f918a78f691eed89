"""The scheduled check of the schedules: repair runs and slots after a kill, and fail if a scheduled run is missing."""

from __future__ import annotations

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.states import Completed, Failed, State

from flows import slots


@flow(name="afterimage-watch")
def watch() -> State[None]:
    """Free concurrency slots that no run holds, and report schedules that are late or plan no run.

    The final state is Failed, with the reason as its message, if a scheduled run did not start.
    """
    log = get_run_logger()
    with get_client(sync_client=True) as client:
        repaired, late = slots.repair(client), slots.late(client)
    for sentence in repaired:
        log.warning(sentence)
    if repaired or late:
        text = "\n".join(f"- {sentence}" for sentence in [*late, *repaired])
        create_markdown_artifact(text, key="watch", description="Late schedules and repairs")
    if late:
        return Failed(message="; ".join(late))
    return Completed(message="; ".join(repaired) or "every schedule is on time")
