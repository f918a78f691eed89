"""Obey a cancellation that Prefect's worker no longer hears.

When the server has been away for 40 s, Prefect 3.8.8 stops to listen for cancellations, also when the server is back;
its setting PREFECT_RUNNER_CRASH_ON_CANCELLATION_FAILURE ends in an error of anyio. So the run itself asks.
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

ASK_SECONDS = 10.0
WORKER_SECONDS = 20.0
"""The worker has this long to end a run that is being cancelled, as it does when it hears of it."""


@contextmanager
def obeyed(run: UUID) -> Iterator[threading.Event]:
    """End the stage within the block when the flow run is being cancelled and the worker does not end it.

    Yields what is set then. The stage is on the leash of `flows/leash.py`, so training saves a checkpoint first.
    """
    over, cancelled = threading.Event(), threading.Event()
    threading.Thread(target=_watch, args=(run, over, cancelled), name="cancellation", daemon=True).start()
    try:
        yield cancelled
    finally:
        over.set()


def _watch(run: UUID, over: threading.Event, cancelled: threading.Event) -> None:
    since: float | None = None
    while not over.wait(ASK_SECONDS):
        if not _is_cancelling(run):
            since = None
            continue
        since = since or time.monotonic()
        if time.monotonic() - since >= WORKER_SECONDS:
            cancelled.set()
            for child in psutil.Process().children():
                with suppress(psutil.NoSuchProcess):
                    child.terminate()


def _is_cancelling(run: UUID) -> bool:
    """Whether the server says so; False while it is away."""
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(run).state
    except (PrefectException, httpx.HTTPError):
        return False
    return state is not None and state.type == StateType.CANCELLING
