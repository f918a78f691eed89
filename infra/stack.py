"""`make stack`: start the shared stack on this machine without containers, in the background, on 127.0.0.1.

PostgreSQL if it is installed, SeaweedFS (S3), MLflow's server with its database in PostgreSQL and its artifacts in S3,
Prefect's server with its database in PostgreSQL, the deployments, and a worker that reports to that MLflow. Processes
that run already are kept. `make stack-down` ends all of them and keeps their files. `compose.yaml` is the stack for
more than one person.

With MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment, MLflow asks for that login; with
PREFECT_API_AUTH_STRING, Prefect does.
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from flows import serve, server
from flows.stop import stop
from infra import mlflow_server, private_file, stack_database, stack_storage
from tasks.params.redaction import redacted
from tasks.runtime import locks, loopback, workspace
from tasks.runtime.errors import StageError

PROCFILE = Path("infra") / "stack.procfile"
MLFLOW = "mlflow"
"""Name of a line of the process file."""
EXPORTS = server.STACK / "env"
"""Shell file with the variables by which commands find the stack; only its owner may read it."""
START_SECONDS = 300.0
PREFECT_DATABASE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
AWS = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_PROFILE")
"""If one of them is set, the worker's downloads and its DVC remote are elsewhere."""


@dataclass(frozen=True)
class Ports:
    """Ports of the servers; None uses Prefect's default, or that of the running server."""

    prefect: int | None
    mlflow: int
    storage: int


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m infra.stack", description="Start or end the stack on 127.0.0.1.")
    parser.add_argument("--down", action="store_true", help="end the processes of the stack; their files stay")
    parser.add_argument("--port", type=int, help=f"of Prefect's server (default {server.DEFAULT_PORT})")
    parser.add_argument("--mlflow-port", type=int, default=5000, help="default 5000")
    parser.add_argument(
        "--storage-port",
        type=int,
        default=9000,
        help=f"first of the {stack_storage.PORTS} ports of the S3-compatible server (default 9000)",
    )
    given = parser.parse_args()
    loopback.exempt(os.environ)
    root = workspace.root()
    try:
        with locks.exclusive(root / ".prefect" / "serve.lock"):
            if given.down:
                stop(root)
            else:
                start(root, Ports(given.port, given.mlflow_port, given.storage_port))
    except StageError as error:
        sys.exit(f"stack: error: {redacted(str(error))}")


def start(root: Path, ports: Ports) -> None:
    """Start what does not run yet, and print the addresses.

    Raises `StageError` if a port is taken, what runs uses another server than would start, or a server does not start.
    """
    up = server.running(root)
    _require_same_servers(up, ports)
    _require_ports(up, ports)
    folder = root / server.STACK
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    identity = stack_storage.identity(folder)
    if {stack_storage.STORAGE, MLFLOW, server.SERVER, server.WORKER} <= up.keys():
        print("stack: all of it runs already")
    database = _start_database(root, folder, up)
    storage = up[stack_storage.STORAGE].port if stack_storage.STORAGE in up else ports.storage
    options = {"STORAGE_OPTIONS": str(stack_storage.write_options(folder, storage))}
    _start(root, stack_storage.STORAGE, storage, options, lambda: stack_storage.usable(identity, storage))
    mlflow = up[MLFLOW].port if MLFLOW in up else ports.mlflow
    _start(root, MLFLOW, mlflow, _of_mlflow(identity, storage, database), lambda: _answers(server.url(mlflow)))
    exports = {"MLFLOW_TRACKING_URI": server.url(mlflow), "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "true"}
    if not any(os.environ.get(name) for name in AWS):
        exports |= identity.variables(storage)
    os.environ.update(exports)  # the worker inherits them
    serve.serve(root, ports.prefect)
    prefect = server.running(root)[server.SERVER].port
    _export(root, exports | server.client_settings(root, prefect))
    print(f"stack: MLflow {server.url(mlflow)}\nstack: S3 {server.url(storage)} (buckets mlflow and dvc)")
    print(f"stack: Prefect {server.url(prefect)}\nstack: for commands in this shell:\n  source {EXPORTS}")


def _require_same_servers(up: dict[str, server.Process], ports: Ports) -> None:
    """Raise `StageError` if a process that runs would not find a server that starts now, as after a kill of that one.

    A worker of `make serve` reports to another MLflow, and a server may have had another port.
    """
    uses = (
        (server.WORKER, "MLFLOW_TRACKING_URI", MLFLOW, ports.mlflow),
        (MLFLOW, "AWS_ENDPOINT_URL", stack_storage.STORAGE, ports.storage),
    )
    for client, variable, name, port in uses:
        if client in up and name not in up and _variable(up[client], variable) != server.url(port):
            raise StageError(
                f"the {client} that runs uses another {name} than the one to start; end it first: make stop"
            )


def _variable(process: server.Process, name: str) -> str | None:
    """A variable of a running process; None if it has none, or has ended."""
    try:
        return psutil.Process(process.pid).environ().get(name)
    except psutil.Error:
        return None


def _require_ports(up: dict[str, server.Process], ports: Ports) -> None:
    """Raise `StageError` if a port of a server that does not run yet is taken; nothing has started then."""
    wanted = [] if MLFLOW in up else [("mlflow-port", ports.mlflow, ports.mlflow)]
    if stack_storage.STORAGE not in up:
        wanted += [("storage-port", ports.storage, ports.storage + more) for more in range(stack_storage.PORTS)]
    for option, first, port in wanted:
        with socket.socket() as probe:
            if probe.connect_ex((server.HOST, port)) == 0:
                raise StageError(f"port {port} is in use; name another: --{option} {first + 100}")
    serve.port_of(up, ports.prefect)


def _start_database(root: Path, folder: Path, up: dict[str, server.Process]) -> str:
    """Start PostgreSQL if it can be used; returns the address of MLflow's database."""
    chosen = stack_database.choose(folder)
    if isinstance(chosen, str):
        print(f"stack: the databases are SQLite files, because {chosen}", flush=True)
        return f"sqlite:///{folder / 'mlflow.db'}"
    if stack_database.POSTGRES not in up:
        print(f"stack: starting PostgreSQL of {chosen.programs}", flush=True)
        stack_database.start(root, chosen, _variables(root, 0, chosen.variables()), PROCFILE)
    os.environ[PREFECT_DATABASE] = chosen.prefect()
    return chosen.mlflow()


def _of_mlflow(identity: stack_storage.Identity, storage: int, database: str) -> dict[str, str]:
    return {
        **identity.variables(storage),
        mlflow_server.DATABASE: database,
        "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{stack_storage.ARTIFACTS}",
    }


def _start(root: Path, name: str, port: int, more: dict[str, str], ready: Callable[[], bool]) -> None:
    """Start a line of the process file if it does not run, and wait until `ready`."""
    process = server.running(root).get(name)
    if process is None:
        print(f"stack: starting {name}", flush=True)
        process = server.start(root, name, _variables(root, port, more), PROCFILE)
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if not server.alive(process) or time.monotonic() > deadline:
            server.stop(root, process)
            raise StageError(f"{name} did not start; {root / server.LOGS / f'{name}.log'} says why")
        time.sleep(0.3)


def _variables(root: Path, port: int, more: dict[str, str]) -> dict[str, str]:
    """Environment of a server of the stack, without the user's own access to S3."""
    kept = {name: value for name, value in server.environment(root, None).items() if not name.startswith("AWS_")}
    return {**kept, "PORT": str(port), **more}


def _answers(address: str) -> bool:
    """Whether an HTTP server answers there, with whatever status."""
    try:
        urllib.request.urlopen(f"{address}/health", timeout=server.ANSWER_SECONDS).close()  # noqa: S310 - on this machine
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _export(root: Path, variables: dict[str, str]) -> None:
    """Write the variables and the logins of the servers to the shell file."""
    names = (mlflow_server.NAME, mlflow_server.PASSWORD, server.LOGIN)
    logins = {name: os.environ[name] for name in names if os.environ.get(name)}
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in (variables | logins).items()]
    private_file.write(root / EXPORTS, "".join(lines))


if __name__ == "__main__":
    main()
