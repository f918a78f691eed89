"""Run MLflow's server with a login, if the environment has one; without one it is bound to this machine.

    MLFLOW_TRACKING_USERNAME=me MLFLOW_TRACKING_PASSWORD=... python -m infra.mlflow_server --host 0.0.0.0 --port 5000

The name and password are those that MLflow's clients read. With them, the server answers nobody else (its app
`basic-auth`), and that user is its administrator. The database and the store of artifacts come from MLflow's own
variables MLFLOW_BACKEND_STORE_URI and MLFLOW_ARTIFACTS_DESTINATION, so that no password is in the list of processes.
"""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

from infra import private_file
from tasks.runtime import workspace
from tasks.runtime.errors import StageError

NAME, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
DATABASE = "MLFLOW_BACKEND_STORE_URI"
SHORTEST = 12
"""Characters of the shortest password that MLflow accepts."""
FORMER_DEFAULT = "password1234"
"""The administrator's password in older versions of MLflow, known to everybody."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m infra.mlflow_server", description="Run MLflow's server.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=5000, help="default 5000")
    parser.add_argument("--allowed-hosts", metavar="HOSTS", help="names by which clients reach it, with ports")
    given = parser.parse_args()
    try:
        command, variables = prepare(given.host, given.port, given.allowed_hosts, workspace.root() / ".prefect")
    except StageError as error:
        sys.exit(f"mlflow_server: error: {error}")
    os.execve(command[0], command, variables)  # noqa: S606


def prepare(host: str, port: int, allowed_hosts: str | None, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the command of the server and its environment; with a login, its settings are written to `folder`.

    Raises:
        StageError: if other machines could reach the server without a login, or MLflow would refuse the login.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--allowed-hosts", allowed_hosts] if allowed_hosts else []
    defaults = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    variables = defaults | os.environ
    login = _login(variables)
    if login is None:
        if not _is_loopback(host):
            raise StageError(f"other machines reach MLflow on {host}, so it needs a login; set {NAME} and {PASSWORD}")
        return command, variables
    if importlib.util.find_spec("flask_wtf") is None:
        raise StageError("a login for MLflow needs the package Flask-WTF; install it: make install EXTRA=stack")
    settings = folder / "mlflow-login.ini"
    private_file.write(settings, _settings(variables.get(DATABASE, "sqlite:///mlflow.db"), folder))
    variables |= {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_USERNAME": login[0],
        "MLFLOW_AUTH_ADMIN_PASSWORD": login[1],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
    }
    return [*command, "--app-name", "basic-auth"], variables


def _login(variables: Mapping[str, str]) -> tuple[str, str] | None:
    name, password = variables.get(NAME, ""), variables.get(PASSWORD, "")
    if not name and not password:
        return None
    if not name or not password:
        raise StageError(f"a login for MLflow needs both {NAME} and {PASSWORD}; set both or neither")
    if len(password) < SHORTEST or password == FORMER_DEFAULT:
        raise StageError(f"{PASSWORD} must have {SHORTEST} characters or more, and not be MLflow's former default")
    return name, password


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _settings(database: str, folder: Path) -> str:
    """The file of the app `basic-auth`: logins are kept beside the runs in a database server, else in a file."""
    logins = f"sqlite:///{folder / 'mlflow-logins.db'}" if database.startswith("sqlite:") else database
    lines = {
        "default_permission": "READ",  # of users whom the administrator adds
        "database_uri": logins.replace("%", "%%"),  # ConfigParser replaces %(name)s
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
        "auth_cache_ttl_seconds": "60",  # without it, each request computes the slow hash of its password
    }
    return "[mlflow]\n" + "".join(f"{name} = {value}\n" for name, value in lines.items())


if __name__ == "__main__":
    main()
