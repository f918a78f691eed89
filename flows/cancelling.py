"""A flow run that polls its own state: it notices a cancellation, and corrects a server that takes it for crashed.

After 40 s without the server, the worker of Prefect 3.8.8 stops watching for cancellations and does not resume when the
server is back. With PREFECT_RUNNER_CRASH_ON_CANCELLATION_FAILURE=true it kills the run, but that kill ends in a
NoEventLoopError, so the setting is not used.

A server that was away for longer than `server.SILENCE_SECONDS` finds no heartbeats of that time, and marks runs as
crashed whose processes work. Their tasks would then be refused.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from uuid import UUID

import httpx
import psutil
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.exceptions import PrefectException
from prefect.states import Running

from flows.server import SILENT
from tasks.runtime import leash

POLL_SECONDS = 10.0
WORKER_SECONDS = 20.0
"""A worker that notices the cancellation ends the run within this time."""
REPEAT_SECONDS = 1.0


@contextmanager
def obeyed(run: UUID) -> Iterator[threading.Event]:
    """End the stage that runs in the block when the flow run is being cancelled and the worker does not end it.

    In the block, the run also sets its state back to Running if the server takes it for crashed.
    Yields an event that is set if this function ended the stage. The stage is on the leash of `tasks/runtime/leash.py`,
    so training saves a checkpoint first.
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
        if revive(run) != StateType.CANCELLING:
            since = None
            continue
        since = since or time.monotonic()
        if time.monotonic() - since >= WORKER_SECONDS:
            cancelled.set()
            end_stages()


@contextmanager
def interrupting(stop: threading.Event) -> Iterator[Callable[[], None]]:
    """Yield a function that sets `stop` and ends the stages that other threads run, until the block ends.

    A thread may be about to start the process of a stage, so the stages are ended again every second.
    """
    over = threading.Event()

    def end() -> None:
        while not over.is_set():
            end_stages()
            over.wait(REPEAT_SECONDS)

    def interrupt() -> None:
        stop.set()
        threading.Thread(target=end, name="interruption", daemon=True).start()

    try:
        yield interrupt
    finally:
        over.set()


def end_stages() -> None:
    """Send SIGTERM to the stages that this process runs on a leash; training saves a checkpoint and ends.

    Other children, such as a temporary Prefect server, go on.
    """
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if leash.__file__ in child.cmdline():
                child.terminate()


def revive(run: UUID) -> StateType | None:
    """The state of the flow run of this process, after correcting it if the server has missed its heartbeats.

    None if the server does not answer.
    """
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(run).state
            if state and state.type == StateType.CRASHED and (state.message or "").startswith(SILENT):
                message = "The server was away and missed the heartbeats; the run continues"
                client.set_flow_run_state(run, Running(message=message), force=True)
                return StateType.RUNNING
    except (PrefectException, httpx.HTTPError):
        return None
    return state.type if state else None
