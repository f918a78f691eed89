"""`make ui`: serve the MLflow UI of this work tree on 127.0.0.1."""

from __future__ import annotations

import argparse
import os
import socket
import sys

from tasks.params.redaction import redacted, without_user
from tasks.runtime import loopback, tracking, workspace
from tasks.runtime.errors import StageError

HOST = "127.0.0.1"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m infra.ui", description="Serve the MLflow UI of this work tree.")
    parser.add_argument("--port", type=int, default=5000)
    port = parser.parse_args().port
    loopback.exempt(os.environ)
    uri = workspace.tracking_uri()
    if uri.startswith(("http://", "https://")):
        print(f"ui: MLFLOW_TRACKING_URI names a server, which has its own UI: open {without_user(uri)}")
        return
    print(f"ui: http://{HOST}:{port} in a few seconds; Ctrl-C ends it", flush=True)
    if port_is_taken(port):
        sys.exit(f"ui: error: port {port} is in use; name another one: make ui PORT={port + 1}")
    try:
        tracking.connect()  # one process creates the tables of a new database; several at once would break it
    except StageError as error:
        sys.exit(f"ui: error: {redacted(str(error))}")
    # One worker and no job execution: 2 processes and 5 s to start instead of 15 processes and 24 s.
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    os.execv(sys.executable, [*command, "--host", HOST, "--port", str(port), "--workers", "1"])  # noqa: S606


def port_is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


if __name__ == "__main__":
    main()
