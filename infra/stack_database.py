"""The database of `make stack`: PostgreSQL if it is installed and may run here, else a SQLite file.

PostgreSQL listens on a socket in `.prefect/stack/`, a folder that only its owner may enter, and on no port; so it needs
no password.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from flows import server
from tasks.runtime.errors import StageError

POSTGRES = "postgres"
"""Name of the line of the process file, and of the program."""
USER, DATABASE = "afterimage", "mlflow"
LONGEST_SOCKET = 90
"""Characters of the socket's folder; the system allows 107 with the file name."""
START_SECONDS = 60.0


def choose(folder: Path) -> tuple[str, str | None]:
    """Return the address of the database in `folder`, and why it is not PostgreSQL, or None if it is.

    A database that is there already is kept; that of PostgreSQL is created on the first call.
    """
    sqlite = folder / "mlflow.db"
    cluster = folder / POSTGRES
    if sqlite.exists():
        return f"sqlite:///{sqlite}", "it exists already"
    reason = None if (cluster / "PG_VERSION").exists() else _create(cluster)
    return (f"sqlite:///{sqlite}", reason) if reason else (f"postgresql://{USER}@/{DATABASE}?host={folder}", None)


def _create(cluster: Path) -> str | None:
    """Create the files of PostgreSQL; returns why that is not possible, or None."""
    program = shutil.which("initdb")
    if program is None:
        return "PostgreSQL's programs are not on the PATH"
    if importlib.util.find_spec("psycopg2") is None:
        return "its driver is missing (pip install psycopg2-binary)"
    if len(str(cluster.parent)) > LONGEST_SOCKET:
        return "the path of the work tree is too long for its socket"
    command = [program, "-D", str(cluster), "-U", USER, "--auth=trust", "--encoding=UTF8", "--locale=C"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    shutil.rmtree(cluster, ignore_errors=True)
    return (done.stderr.strip().splitlines() or ["initdb failed"])[0]


def wait(root: Path, folder: Path, process: server.Process, environment: Mapping[str, str]) -> None:
    """Wait until PostgreSQL answers, and create MLflow's database. Raises `StageError` if it does not start."""
    command = ["createdb", f"--host={folder}", f"--username={USER}", DATABASE]
    deadline = time.monotonic() + START_SECONDS
    while True:
        done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False)
        if done.returncode == 0 or "already exists" in done.stderr:
            return
        if not server.alive(process) or time.monotonic() > deadline:
            server.stop(root, process)
            raise StageError(f"PostgreSQL did not start; {root / server.LOGS / f'{POSTGRES}.log'} says why")
        time.sleep(0.3)
