"""`make stack`: start the shared stack on this machine without containers, in the background, on 127.0.0.1.

PostgreSQL if it is installed, MLflow's server with proxied artifacts, an S3-compatible server, Prefect's server, the
deployments and a worker that reports to that MLflow. Processes that run already are kept. `make stack-down` ends all of
them. `compose.yaml` is the stack for more than one person: with logins, and an S3 server that keeps its objects.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from flows import serve, server
from flows.stop import stop
from infra import stack_database
from tasks.params.redaction import redacted
from tasks.runtime import locks, loopback, workspace
from tasks.runtime.errors import StageError

PROCFILE = Path("infra") / "stack.procfile"
MLFLOW, STORAGE = "mlflow", "storage"
"""Names of the lines of the process file."""
FOLDER = Path(".prefect") / "stack"
"""MLflow's database and artifacts."""
START_SECONDS = 180.0
MEMORY = "objects stay in memory until make stack-down"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m infra.stack", description="Start or end the stack on 127.0.0.1.")
    parser.add_argument("--down", action="store_true", help="end the processes of the stack")
    parser.add_argument("--port", type=int, help=f"of Prefect's server (default {server.DEFAULT_PORT})")
    parser.add_argument("--mlflow-port", type=int, default=5000, help="default 5000")
    parser.add_argument("--storage-port", type=int, default=9000, help="of the S3-compatible server (default 9000)")
    given = parser.parse_args()
    loopback.exempt(os.environ)
    root = workspace.root()
    try:
        with locks.exclusive(root / ".prefect" / "serve.lock"):
            if given.down:
                stop(root)
            else:
                start(root, given.port, given.mlflow_port, given.storage_port)
    except StageError as error:
        sys.exit(f"stack: error: {redacted(str(error))}")


def start(root: Path, port: int | None, mlflow_port: int, storage_port: int) -> None:
    """Start what does not run yet, and print the addresses.

    Raises `StageError` if a port is taken, a worker with another MLflow runs, or a server does not start.
    """
    up = server.running(root)
    if server.WORKER in up and MLFLOW not in up:
        raise StageError("a worker of make serve runs, which reports to another MLflow; end it first: make stop")
    (root / FOLDER).mkdir(parents=True, exist_ok=True, mode=0o700)
    database, reason = stack_database.choose(root / FOLDER)
    print(f"stack: MLflow's database is {f'SQLite: {reason}' if reason else 'PostgreSQL'}", flush=True)
    if reason is None and stack_database.POSTGRES not in up:
        variables = _variables(root, 0, database)
        process = server.start(root, stack_database.POSTGRES, variables, PROCFILE)
        stack_database.wait(root, root / FOLDER, process, variables)
    storage = (
        _started(root, STORAGE, _variables(root, storage_port, database)) if importlib.util.find_spec("moto") else None
    )
    mlflow = _started(root, MLFLOW, _variables(root, mlflow_port, database))
    os.environ["MLFLOW_TRACKING_URI"] = mlflow  # the worker inherits it
    serve.serve(root, port)
    print(f"stack: MLflow {mlflow}; for commands in this shell:\n  export MLFLOW_TRACKING_URI={mlflow}")
    if storage:
        print(f"stack: S3 {storage} ({MEMORY}):")
        print(f"  export AWS_ENDPOINT_URL={storage} AWS_ACCESS_KEY_ID=any AWS_SECRET_ACCESS_KEY=any")


def _started(root: Path, name: str, variables: dict[str, str]) -> str:
    """Start a line of the process file if it does not run; returns the address of its server when it answers."""
    process, port = server.running(root).get(name), int(variables["PORT"])
    if process is None:
        with socket.socket() as probe:
            if probe.connect_ex((server.HOST, port)) == 0:
                raise StageError(f"port {port} is in use; name another: --{name}-port {port + 1}")
        print(f"stack: starting {name}", flush=True)
        process = server.start(root, name, variables, PROCFILE)
    address = server.url(process.port)
    deadline = time.monotonic() + START_SECONDS
    while not _answers(address):
        if not server.alive(process) or time.monotonic() > deadline:
            server.stop(root, process)
            raise StageError(f"{name} did not start; {root / server.LOGS / f'{name}.log'} says why")
        time.sleep(0.3)
    return address


def _variables(root: Path, port: int, database: str) -> dict[str, str]:
    return {
        **server.environment(root, None),
        "PORT": str(port),
        "STACK_DATABASE": database,
        "STACK_FOLDER": str(root / FOLDER),
        "STACK_ARTIFACTS": str(root / FOLDER / "artifacts"),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # without it 2 processes instead of 15
    }


def _answers(address: str) -> bool:
    """Whether an HTTP server answers there, with whatever status."""
    try:
        urllib.request.urlopen(f"{address}/health", timeout=server.ANSWER_SECONDS).close()  # noqa: S310 - on this machine
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
