"""Compare deployments with their runs: end runs without a process, free slots, skip missed runs, find late schedules.

A deployment with a concurrency limit counts its runs in `active_slots`. If the server is killed while a run is pending,
the run can stay pending for ever or its slot can stay taken; the strategy CANCEL_NEW then cancels every later run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import psutil
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import get_current_settings
from prefect.states import Cancelled, Crashed

from flows.server import POOL

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse

HOLDING = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
"""States in which a run occupies a slot of its deployment."""
START_SECONDS = 60
"""Within this time a worker starts the process of a run that it has set to pending."""
RECHECK_SECONDS = 2.0
LATE = timedelta(minutes=10)
RUN_VARIABLE = "PREFECT__FLOW_RUN_ID"
"""Set by Prefect's worker in the process of a run; the stages inherit it."""


def repair(client: SyncPrefectClient, taken_before: datetime | None = None) -> list[str]:
    """Mark runs without a process as crashed and free slots without a run; returns one sentence for each.

    Only runs of this work tree's worker that have been in their state since before `taken_before` (default:
    `START_SECONDS` ago) are examined; those of other work pools have their processes elsewhere.
    """
    taken_before = taken_before or datetime.now(UTC) - timedelta(seconds=START_SECONDS)
    runs = client.read_flow_runs(flow_run_filter=_in_states(HOLDING))
    alive = _with_process()
    gone = [
        run
        for run in runs
        if run.work_pool_name == POOL and run.state and run.state.timestamp < taken_before and run.id not in alive
    ]
    return [_end(client, run) for run in gone] + list(_free_slots(client))


def _in_states(types: list[StateType]) -> FlowRunFilter:
    return FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=types)))


def _with_process() -> set[UUID]:
    """Flow runs that have a running process of this user."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, ValueError):
            if identity := process.environ().get(RUN_VARIABLE):
                found.add(UUID(identity))
    return found


def _end(client: SyncPrefectClient, run: FlowRun) -> str:
    """Set the final state of a run without a process, which also releases its slot and its lease."""
    assert run.state is not None
    was = run.state.name
    message = f"Its process was gone while it was {was}"
    cancelled = run.state.type == StateType.CANCELLING
    client.set_flow_run_state(run.id, Cancelled(message=message) if cancelled else Crashed(message=message), force=True)
    return f"flow run '{run.name}' was {was} without a process and is {'cancelled' if cancelled else 'crashed'} now"


def _free_slots(client: SyncPrefectClient) -> Iterator[str]:
    """Free slots that are unheld in two checks: a run may end between reading the slots and reading the runs."""
    first = _unheld(client)
    if not first:
        return
    time.sleep(RECHECK_SECONDS)
    for name, (limit, second) in _unheld(client).items():
        if slots := min(second, first.get(name, (limit, 0))[1]):
            client.release_concurrency_slots(names=[limit], slots=slots, occupancy_seconds=1)
            yield f"{slots} slot(s) of deployment '{name}' were held by no run and are free now"


def _unheld(client: SyncPrefectClient) -> dict[str, tuple[str, int]]:
    """Deployment -> the name of its limit, and how many of its slots neither a run nor a valid lease holds."""
    found = {}
    leases = _leases()
    for deployment in client.read_deployments():
        if limit := deployment.global_concurrency_limit:
            taken = client.read_global_concurrency_limit_by_name(limit.name).active_slots
            holders = len(client.read_flow_runs(deployment_filter=_is(deployment), flow_run_filter=_in_states(HOLDING)))
            if surplus := max(0, int(taken) - max(holders, leases.count(str(limit.id)))):
                found[deployment.name] = (limit.name, surplus)
    return found


def _leases() -> list[str]:
    """Concurrency limits of the leases that are still valid; the server itself frees the slots of expired ones."""
    limits: list[str] = []
    for path in (Path(get_current_settings().home) / "concurrency_leases").glob("*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            lease = json.loads(path.read_text(encoding="utf-8"))
            if datetime.fromisoformat(lease["expiration"]) > datetime.now(UTC):
                limits += lease["resource_ids"]
    return limits


def _is(deployment: DeploymentResponse) -> DeploymentFilter:
    return DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))


def skip_missed(client: SyncPrefectClient) -> list[str]:
    """Cancel all but the newest of the scheduled runs that no worker started in time; one sentence per deployment.

    To be called before a worker starts: it would run all of them, those of a week without a worker as well.
    """
    return [sentence for deployment in client.read_deployments() if (sentence := _skip(client, deployment))]


def _skip(client: SyncPrefectClient, deployment: DeploymentResponse) -> str | None:
    """Cancel the missed runs of one deployment, a page of the server at a time."""
    waiting = _in_states([StateType.SCHEDULED])
    waiting.expected_start_time = FlowRunFilterExpectedStartTime(before_=datetime.now(UTC))
    state = Cancelled(message="Missed: no worker ran at that time, and a newer run of the schedule is due")
    skipped = 0
    while missed := _auto_scheduled(client, deployment, waiting)[1:]:
        for run in missed:
            client.set_flow_run_state(run.id, state, force=True)
        skipped += len(missed)
    return (
        f"{skipped} missed run(s) of deployment '{deployment.name}' are skipped; the newest starts" if skipped else None
    )


def _auto_scheduled(client: SyncPrefectClient, deployment: DeploymentResponse, which: FlowRunFilter) -> list[FlowRun]:
    """Runs of a schedule, newest first, at most a page of the server."""
    runs = client.read_flow_runs(
        deployment_filter=_is(deployment), flow_run_filter=which, sort=FlowRunSort.EXPECTED_START_TIME_DESC
    )
    return [run for run in runs if run.auto_scheduled]


def late(client: SyncPrefectClient) -> list[str]:
    """One sentence for each deployment whose scheduled runs do not start or are not planned."""
    sentences = (_late(client, deployment) for deployment in client.read_deployments() if _is_scheduled(deployment))
    return [sentence for sentence in sentences if sentence]


def _is_scheduled(deployment: DeploymentResponse) -> bool:
    return not deployment.paused and any(schedule.active for schedule in deployment.schedules)


def _late(client: SyncPrefectClient, deployment: DeploymentResponse) -> str | None:
    """The fault of a schedule: a due run was not started, two in a row did not begin, or none is planned."""
    now = datetime.now(UTC)
    before = FlowRunFilter(expected_start_time=FlowRunFilterExpectedStartTime(before_=now - LATE))
    due = _auto_scheduled(client, deployment, before)[:2]
    if due and due[0].state_type == StateType.SCHEDULED:
        return f"the run of '{deployment.name}' due at {_when(due[0])} has not started"
    if len(due) == 2 and not any(run.start_time for run in due) and not _began_since(client, deployment, due[-1]):
        reason = (due[0].state and due[0].state.message) or due[0].state_name
        dates = f"{_when(due[1])} and {_when(due[0])}"
        return f"the last two runs of '{deployment.name}', due at {dates}, did not begin ({reason})"
    settled = deployment.updated is not None and deployment.updated < now - LATE
    if settled and not client.read_flow_runs(
        deployment_filter=_is(deployment),
        flow_run_filter=FlowRunFilter(expected_start_time=FlowRunFilterExpectedStartTime(after_=now)),
        limit=1,
    ):
        return f"the server has planned no run of '{deployment.name}'; restart it: make stop && make serve"
    return None


def _began_since(client: SyncPrefectClient, deployment: DeploymentResponse, run: FlowRun) -> bool:
    """Whether any run began since `run` was due: after a long pause the server starts all missed runs at once."""
    began = FlowRunFilter(start_time=FlowRunFilterStartTime(after_=run.expected_start_time))
    return bool(client.read_flow_runs(deployment_filter=_is(deployment), flow_run_filter=began, limit=1))


def _when(run: FlowRun) -> str:
    return f"{run.expected_start_time:%Y-%m-%d %H:%M} UTC"
