"""Notifications about flow runs: the automations of a real Prefect server call a webhook on this machine."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from flows import server
from tests.support import tiny
from tests.support.webhook import Receiver, receiving

BLOCK = """
import sys
from prefect.blocks.notifications import CustomWebhookNotificationBlock as Block
Block(name="team", url=sys.argv[1], json_data={"event": "block", "text": "{{subject}}: {{body}}"}).save("team")
"""
"""A block as for Slack or e-mail, whose messages go to an address of the test."""
SET_UP = """
from flows import notifications
for _ in range(2):
    print(notifications.set_up(notifications.Limits(pending=60, running=60)))
"""


class Prefect:
    """A Prefect server without a worker; the runs change their states by its API."""

    def __init__(self, root: Path, api: httpx.Client, variables: dict[str, str]) -> None:
        self.root = root
        self.api = api
        self.variables = variables
        self.flow = self._post("/flows/", name="afterimage-test")["id"]

    def _post(self, path: str, **body: object) -> dict[str, str]:
        answer = self.api.post(path, json=body)
        while answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:  # its SQLite file is busy
            time.sleep(1)
            answer = self.api.post(path, json=body)
        return answer.raise_for_status().json()

    def run_through(self, name: str, *states: dict[str, str]) -> str:
        """Return the id of a new run that went through the states."""
        identity = self._post("/flow_runs/", name=name, flow_id=self.flow)["id"]
        for state in states:
            self._post(f"/flow_runs/{identity}/set_state", state=state, force=True)
        return identity

    def automations(self) -> list[str]:
        return [found["name"] for found in self.api.post("/automations/filter", json={}).raise_for_status().json()]

    def set_up(self, address: str, block: str = "") -> subprocess.CompletedProcess[str]:
        """Set the notifications up twice, as two calls of `make serve` do."""
        return self.python(SET_UP, AFTERIMAGE_WEBHOOK_URL=address, AFTERIMAGE_NOTIFICATION_BLOCK=block)

    def python(self, code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Python code in a process with the settings of this server."""
        variables = self.variables | variables
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, cwd=tiny.ROOT, env=variables, capture_output=True, text=True, timeout=300)


@pytest.fixture
def prefect(tmp_path, monkeypatch, migrated_prefect):
    database = tmp_path / "elsewhere.db"
    shutil.copy(migrated_prefect, database)
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{database}")
    monkeypatch.setenv("PREFECT_API_KEY", "somebody's")
    (tmp_path / server.PROCFILE).parent.mkdir()
    shutil.copy(tiny.ROOT / server.PROCFILE, tmp_path / server.PROCFILE)
    with socket.socket() as probe:
        probe.bind((server.HOST, 0))
        port = probe.getsockname()[1]
    variables = server.environment(tmp_path, port) | {"PYTHONPATH": str(tiny.ROOT)}
    process = server.start(tmp_path, server.SERVER, variables)
    try:
        api = f"{server.url(port)}/api"
        deadline = time.monotonic() + 600
        while not server.answers(api):
            assert time.monotonic() < deadline and server.alive(process)
            time.sleep(0.2)
        with httpx.Client(base_url=api, timeout=300) as client:
            yield Prefect(tmp_path, client, variables)
    finally:
        server.stop(tmp_path, process)


@pytest.mark.slow  # a server of its own
@pytest.mark.timeout(1500)
def test_failed_crashed_late_and_stuck_runs_reach_the_webhook(prefect):
    with receiving() as receiver:
        missing = prefect.set_up(receiver.address, "slack-webhook/team")
        assert "StageError: Prefect has no block slack-webhook/team; create it on the page Blocks" in missing.stderr
        made = prefect.python(BLOCK, receiver.address)
        assert made.returncode == 0, made.stderr
        done = prefect.set_up(receiver.address, "custom-webhook/team")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == (
            "failed, crashed, late and stuck runs are reported to the webhook of AFTERIMAGE_WEBHOOK_URL"
            " and the block custom-webhook/team"
        )
        assert "a-secret-path" not in done.stdout + done.stderr
        assert len(prefect.automations()) == len(set(prefect.automations())) == 5
        _go_through_all(prefect, receiver)
    with sqlite3.connect(prefect.root / "elsewhere.db") as store:  # the caller's database, and not the default
        stored = [row[0] for row in store.execute("select cast(data as text) from block_document")]
    assert len(stored) == 2 and "a-secret-path" not in "".join(stored)
    assert not (prefect.root / ".prefect" / "home" / "prefect.db").exists()
    assert "a-secret-path" not in (prefect.root / server.LOGS / "server.log").read_text()
    assert "notifications are off" in prefect.set_up("").stdout
    assert prefect.automations() == []


def _go_through_all(prefect: Prefect, receiver: Receiver) -> None:
    running = {"type": "RUNNING"}
    prefect.run_through("snail", {"type": "SCHEDULED", "name": "Late"})  # a new run is pending, and waits then
    stuck = prefect.run_through("owl", {"type": "PENDING"}, {"type": "SCHEDULED"}, {"type": "PENDING"})
    slow = prefect.run_through("tortoise", running)
    good = prefect.run_through("good", running, {"type": "COMPLETED"})
    failed = prefect.run_through("crow", running, {"type": "FAILED", "message": 'train: error: "loss" <nan>'})
    prefect.run_through("bat", running, {"type": "CRASHED", "message": "No heartbeat"})
    body = receiver.wait_for("failed", 300)
    assert body["text"] == 'crow: failed: train: error: "loss" <nan>'
    assert (body["flow"], body["flow_run"], body["state"]) == ("afterimage-test", failed, "Failed")
    assert failed in body["url"]
    assert receiver.wait_for("crashed", 300)["text"] == "bat: crashed: No heartbeat"
    assert receiver.wait_for("late", 300)["text"] == "snail: has not started in time"
    assert receiver.wait_for("stuck-pending", 300)["flow_run"] == stuck
    assert receiver.wait_for("stuck-running", 300)["flow_run"] == slow
    receiver.wait_until(lambda received: len({body["text"] for body in received}) == 10, 300)  # some may come twice
    texts = sorted({body["text"] for body in receiver.received if body["event"] == "block"})
    assert [text.splitlines()[0] for text in texts] == [
        "Afterimage: crashed run: bat: crashed: No heartbeat",
        'Afterimage: failed run: crow: failed: train: error: "loss" <nan>',
        "Afterimage: late run: snail: has not started in time",
        "Afterimage: stuck-pending run: owl: was taken by a worker and does not start",
        "Afterimage: stuck-running run: tortoise: runs unusually long",
    ]
    assert good not in str(receiver.received)


def test_only_the_variables_of_the_servers_database_are_passed_on(tmp_path, monkeypatch):
    passed = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": "a", "PREFECT_API_DATABASE_PASSWORD": "b"}
    for name, value in {**passed, "PREFECT_API_KEY": "c", "PREFECT_PROFILE": "d"}.items():
        monkeypatch.setenv(name, value)
    found = server.environment(tmp_path, 1)
    assert passed.items() <= found.items()
    assert not {"PREFECT_API_KEY", "PREFECT_PROFILE"} & found.keys()


def test_an_address_that_is_none_is_one_sentence(tmp_path):
    (tmp_path / server.PROCFILE).parent.mkdir()
    shutil.copy(tiny.ROOT / server.PROCFILE, tmp_path / server.PROCFILE)
    variables = {**os.environ, "PYTHONPATH": str(tiny.ROOT), "AFTERIMAGE_WEBHOOK_URL": "hooks.example/T0/secret"}
    command = [sys.executable, "-m", "flows.serve"]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("serve: error: AFTERIMAGE_WEBHOOK_URL must be an address")
    assert "secret" not in done.stdout + done.stderr
