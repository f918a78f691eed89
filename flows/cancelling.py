"""Cancel a flow run whose cancellation Prefect's worker no longer notices.

After 40 s without the server, the worker of Prefect 3.8.8 stops watching for cancellations and does not resume when the
server is back. With PREFECT_RUNNER_CRASH_ON_CANCELLATION_FAILURE=true it kills the run, but that kill ends in a
NoEventLoopError, so the setting is not used. Instead the run itself polls its state.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from uuid import UUID

import httpx
import psutil
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.exceptions import PrefectException

from tasks.runtime import leash

POLL_SECONDS = 10.0
WORKER_SECONDS = 20.0
"""A worker that notices the cancellation ends the run within this time."""


@contextmanager
def obeyed(run: UUID) -> Iterator[threading.Event]:
    """End the stage that runs in the block when the flow run is being cancelled and the worker does not end it.

    Yields an event that is set in that case. The stage is on the leash of `tasks/runtime/leash.py`, so training saves a
    checkpoint first.
    """
    over, cancelled = threading.Event(), threading.Event()
    threading.Thread(target=_watch, args=(run, over, cancelled), name="cancellation", daemon=True).start()
    try:
        yield cancelled
    finally:
        over.set()


def _watch(run: UUID, over: threading.Event, cancelled: threading.Event) -> None:
    since: float | None = None
    while not over.wait(POLL_SECONDS):
        if not _is_cancelling(run):
            since = None
            continue
        since = since or time.monotonic()
        if time.monotonic() - since >= WORKER_SECONDS:
            cancelled.set()
            end_stages()


def end_stages() -> None:
    """Send SIGTERM to the stages that this process runs on a leash; training saves a checkpoint and ends.

    Other children, such as a temporary Prefect server, go on.
    """
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if leash.__file__ in child.cmdline():
                child.terminate()


def _is_cancelling(run: UUID) -> bool:
    """Whether the server has the run in the state Cancelling; False if it does not answer."""
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(run).state
    except (PrefectException, httpx.HTTPError):
        return False
    return state is not None and state.type == StateType.CANCELLING
