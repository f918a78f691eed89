"""Checks and repair of MLflow's database before MLflow opens it.

If MLflow cannot use a database, it prints a stack trace, retries for minutes, or writes elsewhere. These checks take
milliseconds and raise one sentence instead.
"""

from __future__ import annotations

import importlib.util
import re
import socket
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tasks.params.redaction import redacted
from tasks.runtime.errors import StageError

SQLITE = "sqlite:///"
ARTIFACTS = "mlruns"
"""Folder of the artifacts, beside the SQLite file."""
PROBE_SECONDS = 2.0
CHECKED_BYTES = 256 << 20
"""Databases up to this size are checked completely before each use."""
_DRIVERS = {
    "postgresql": ("psycopg2", "psycopg2-binary"),
    "postgresql+psycopg2": ("psycopg2", "psycopg2-binary"),
    "postgresql+psycopg": ("psycopg", "'psycopg[binary]'"),
    "mysql": ("MySQLdb", "mysqlclient"),
    "mysql+pymysql": ("pymysql", "pymysql"),
    "mssql": ("pyodbc", "pyodbc"),
    "mssql+pyodbc": ("pyodbc", "pyodbc"),
}
"""Scheme of a database's address -> its Python module, and the package that brings it."""
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_OWN = "unset MLFLOW_TRACKING_URI to use the database in the work tree"
# Columns in which MLflow stores absolute paths of artifacts.
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def require_usable(uri: str) -> None:
    """Raise `StageError` if MLflow would misread the path of its database, or cannot reach it. Writes nothing."""
    if uri.startswith(SQLITE):
        _require_plain(uri.removeprefix(SQLITE))
    elif (scheme := uri.partition("://")[0]) in _DRIVERS:
        module, package = _DRIVERS[scheme]
        if importlib.util.find_spec(module) is None:
            raise StageError(
                f"MLflow at {redacted(uri)} needs the package {package}; install it with "
                f"'{sys.executable} -m pip install {package}', or {_OWN}"
            )
        _require_answer(uri, scheme)


def _require_plain(path: str) -> None:
    if "?" in path or re.search("%[0-9A-Fa-f]{2}", path):
        raise StageError(
            f"MLflow would not find its database at {path}, because it reads '?' and '%' in a path as parts of an "
            "address; move the work tree to a path without them, or set MLFLOW_TRACKING_URI to sqlite:///PATH elsewhere"
        )


def _require_answer(uri: str, scheme: str) -> None:
    """Raise `StageError` if a database server refuses connections; MLflow would retry for minutes."""
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port or _PORTS[scheme.partition("+")[0]]
        if host:
            socket.create_connection((unquote(host), port), PROBE_SECONDS).close()
    except (OSError, ValueError) as error:
        raise StageError(
            f"the database at {redacted(uri)} does not answer within {PROBE_SECONDS:.0f} s ({redacted(str(error))}); "
            f"start it, correct MLFLOW_TRACKING_URI (percent-encode '@' and '/' in its password), or {_OWN}"
        ) from None


def require_sound(path: Path) -> None:
    """Raise `StageError` if the SQLite file is damaged or cannot be opened."""
    try:
        # For writing, if allowed: a killed writer leaves a journal, and only then can SQLite undo its transaction.
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=30)) as database:
            check = "quick_check(1)" if path.stat().st_size <= CHECKED_BYTES else "schema_version"
            result = database.execute(f"PRAGMA {check}").fetchone()[0]
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            return  # another process writes; MLflow waits for it
        raise StageError(f"{path} cannot be opened ({error}); correct its permissions") from None
    except sqlite3.DatabaseError as error:
        result = str(error)
    if isinstance(result, str) and result != "ok":
        raise StageError(
            f"the MLflow database {path} is damaged ({' '.join(result.split())}); restore a backup, or move it "
            "away: a new one is made, and 'dvc repro' fills it with this work tree's model and run"
        )


def update_artifact_paths(path: Path) -> int:
    """Update the stored paths of artifacts beside the SQLite file at `path`; returns the number of changed entries.

    MLflow stores absolute paths, so that runs of a work tree that was moved or copied would write into the old one.
    Artifacts at other places, such as a bucket, are not changed.
    """
    home = str(path.parent / ARTIFACTS)
    with closing(sqlite3.connect(path, timeout=30)) as database:
        row = database.execute("SELECT artifact_location FROM experiments WHERE experiment_id = 0").fetchone()
        old = (row[0] or "").removesuffix("/0") if row else ""
        if old in ("", home) or not old.startswith("/") or Path(old).name != ARTIFACTS:
            return 0
        changed = 0
        with database:
            for table, column in PLACES:
                done = database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608 - names from above
                    f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                    (home, len(old) + 1, old, len(old) + 1, f"{old}/"),
                )
                changed += done.rowcount
    return changed
