"""`make serve`: start the Prefect server of this work tree, its deployments and a worker, in the background.

Processes that run already are kept. `make stop` ends all of them.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flows import on_demand, server
from tasks.params.redaction import redacted
from tasks.runtime import locks, loopback, workspace
from tasks.runtime.errors import StageError

START_SECONDS = 600.0
"""The server starts in ten seconds, on a busy machine in minutes."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flows.serve",
        description="Start Prefect's server, deploy prefect.yaml, start a worker; all in the background.",
    )
    parser.add_argument("--port", type=int, help=f"of the server (default {server.DEFAULT_PORT})")
    port = parser.parse_args().port
    loopback.exempt(os.environ)
    root = workspace.root()
    print(f"serve: Prefect for {root}", flush=True)
    try:
        with locks.exclusive(root / ".prefect" / "serve.lock"):
            serve(root, port)
    except StageError as error:
        sys.exit(f"serve: error: {redacted(str(error))}")


def serve(root: Path, port: int | None) -> None:
    """Start the processes that do not run yet, and deploy; returns when a worker waits for scheduled runs.

    Raises `StageError` if the port is taken, the server does not start, or Prefect refuses a deployment.
    """
    server.lines(root)
    workspace.webhook()  # refused before anything starts
    up = server.running(root)
    port = port_of(up, port)
    variables = server.environment(root, port)
    restarted = None
    if server.SERVER not in up:
        print("serve: starting the server (about 10 s)", flush=True)
        restarted = datetime.now(UTC)
        _wait_until_healthy(root, server.start(root, server.SERVER, variables))
    server.require_login(f"{server.url(port)}/api")
    _set_up(variables)
    _repair(restarted, works=server.WORKER in up)
    if server.WORKER not in up:
        server.start(root, server.WORKER, variables)
    print(f"serve: {server.url(port)} (make stop ends it; logs in {server.LOGS}/)")
    print(on_demand.advice(root, port))


def port_of(up: Mapping[str, server.Process], requested: int | None) -> int:
    """The port to use, given the processes that run.

    Raises `StageError` if it is taken, or differs from that of the running server, or of one that has ended and whose
    worker runs.
    """
    known = up.get(server.SERVER) or up.get(server.WORKER)
    if known and requested not in (None, known.port):
        raise StageError(
            f"the {known.name} of this work tree runs on port {known.port} already; stop it first: make stop"
        )
    if server.SERVER in up:
        return up[server.SERVER].port
    port = known.port if known else requested or server.DEFAULT_PORT
    with socket.socket() as probe:
        if probe.connect_ex((server.HOST, port)) == 0:
            raise StageError(f"port {port} is in use; name another: make serve PORT={port + 1}")
    return port


def _wait_until_healthy(root: Path, process: server.Process) -> None:
    log = root / server.LOGS / "server.log"
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if not server.alive(process):
            raise StageError(f"the server ended at once; {log} says why")
        if server.answers(f"{server.url(process.port)}/api"):
            return
        time.sleep(0.3)
    server.stop(root, process)
    raise StageError(f"the server did not answer within {START_SECONDS:.0f} s; {log} may say why")


def _set_up(variables: dict[str, str]) -> None:
    """Create or update the work pool, the automations and the deployments."""
    os.environ.update(variables)  # Prefect reads its settings when it is imported
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists

    from flows import notifications

    with get_client(sync_client=True) as client:
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=server.POOL, type="process"))
        paused = [deployment.id for deployment in client.read_deployments() if deployment.paused]
    _watch_silent_flows()
    if sentence := notifications.set_up():
        print(f"serve: {sentence}")
    print("serve: deploying prefect.yaml", flush=True)
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageError(f"prefect deploy refused: {' '.join((done.stderr or done.stdout).split())}")
    with get_client(sync_client=True) as client:
        for deployment in paused:  # `deploy` resumes paused deployments
            client.pause_deployment(deployment)


def _repair(restarted: datetime | None, works: bool) -> None:
    """Repair runs and slots after a kill of the server or worker, and skip runs that were missed without a worker.

    Args:
        restarted: Start of the server, if it was now.
        works: Whether a worker runs.
    """
    from prefect.client.orchestration import get_client

    from flows import slots

    with get_client(sync_client=True) as client:
        for sentence in slots.repair(client, restarted):
            print(f"serve: repaired: {sentence}")
        for sentence in slots.late(client):
            print(f"serve: warning: {sentence}", file=sys.stderr)
        if not works:
            for sentence in slots.skip_missed(client):
                print(f"serve: {sentence}")


def _watch_silent_flows() -> None:
    """Have the server mark a run as crashed when its process disappears (power cut, kill -9 of the worker)."""
    from prefect.automations import Automation, ChangeFlowRunState, EventTrigger, Posture
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import StateType

    name = "afterimage: silent flows crashed"
    ends = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    trigger = EventTrigger(
        match={"prefect.resource.id": ["prefect.flow-run.*"]},
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.heartbeat", *ends},
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=server.SILENCE_SECONDS),
    )
    action = ChangeFlowRunState(
        state=StateType.CRASHED, name="Crashed", message=f"{server.SILENT} {server.SILENCE_SECONDS} s"
    )
    with get_client(sync_client=True) as client:
        if not client.read_automations_by_name(name):
            Automation(name=name, trigger=trigger, actions=[action]).create()


if __name__ == "__main__":
    main()
