"""Schedules that are late or silent, from the runs that a server lists; tests of a real server: test_prefect_server.py.

A stand-in for Prefect's client answers the three queries of `slots.late`: due runs, planned runs, runs that began.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import StateType

from flows import slots

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

NOW = datetime.now(UTC)
LIMIT = "Deployment concurrency limit reached."


def run(days: int, state: StateType, message: str = "", began: bool = False, by_hand: bool = False) -> SimpleNamespace:
    """A run that was due `days` ago."""
    due = NOW - timedelta(days=days)
    return SimpleNamespace(
        auto_scheduled=not by_hand,
        expected_start_time=due,
        start_time=due if began else None,
        state=SimpleNamespace(message=message),
        state_name=state.value.title(),
        state_type=state,
    )


@dataclass
class Server:
    """What the server lists for the deployment `nightly`."""

    due: list[SimpleNamespace]
    """Latest first."""
    planned: int = 1
    paused: bool = False
    active: bool = True
    deployed: timedelta = timedelta(days=9)

    def read_deployments(self) -> list[SimpleNamespace]:
        schedules = [SimpleNamespace(active=self.active)]
        updated = datetime.now(UTC) - self.deployed  # and not NOW: this file may be imported minutes before the test
        return [SimpleNamespace(id=uuid4(), name="nightly", paused=self.paused, schedules=schedules, updated=updated)]

    def read_flow_runs(self, *, flow_run_filter: Any, **_: object) -> list[Any]:
        if flow_run_filter.start_time:
            since = flow_run_filter.start_time.after_
            return [each for each in self.due if each.start_time and each.start_time >= since]
        if flow_run_filter.expected_start_time.after_:
            return [None] * self.planned
        return self.due


REFUSED = [run(days, StateType.CANCELLED, LIMIT) for days in (1, 2, 3)]
LATE = {
    "a run waits": (Server([run(1, StateType.SCHEDULED)]), r"the run of 'nightly' due at .* UTC has not started"),
    "every run is cancelled": (Server(REFUSED), rf"the last two runs of 'nightly', due at .*\({LIMIT}\)"),
    "no run is planned": (Server([], planned=0), r"has planned no run of 'nightly'; restart it: make stop"),
}
ON_TIME = {
    "runs began": Server([run(1, StateType.COMPLETED, began=True), run(2, StateType.FAILED, began=True)]),
    "one was cancelled beside a long one": Server([REFUSED[0], run(2, StateType.RUNNING, began=True)]),
    "all that were missed began at once": Server([*REFUSED[:2], run(1, StateType.RUNNING, began=True, by_hand=True)]),
    "runs that a person starts may wait": Server([run(1, StateType.SCHEDULED, by_hand=True)]),
    "it is paused": Server(REFUSED, paused=True),
    "its schedule is off": Server(REFUSED, active=False),
    "it was deployed just now": Server([], planned=0, deployed=timedelta(minutes=1)),
}


@pytest.mark.parametrize("kind", LATE)
def test_a_late_or_silent_schedule_is_reported(kind: str) -> None:
    server, said = LATE[kind]
    (sentence,) = slots.late(cast("SyncPrefectClient", server))
    assert re.search(said, sentence)


@pytest.mark.parametrize("kind", ON_TIME)
def test_a_schedule_on_time_is_not_reported(kind: str) -> None:
    assert slots.late(cast("SyncPrefectClient", ON_TIME[kind])) == []
