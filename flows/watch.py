"""The scheduled check of the schedules: repairs what a killed server left, and fails where a nightly run is missing."""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.states import Completed, Failed, State

from flows import slots


@flow(name="afterimage-watch")
def watch() -> State[Any]:
    """Free concurrency slots that no run holds, and report schedules that are late or silent.

    Fails, with the reason as its message, when a scheduled run did not start.
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
