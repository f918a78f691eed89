"""Move an MLflow store to another, empty database: SQLite to PostgreSQL, for example, or to another SQLite file.

    python -m infra.migrate_store sqlite:///mlflow.db postgresql://user:password@host/mlflow [--artifacts FOLDER]

Every table is copied, so that experiments, runs, metrics, parameters, tags, inputs, logged models, registered models,
versions and aliases keep their ids. A SQLite source of an older MLflow is upgraded in a temporary copy; the source is
never written. Afterwards each table is read back, and its rows are compared by number and hash. Artifacts in a folder
are copied with `--artifacts`, by default into `mlruns/` beside a SQLite target, and their files are compared by hash.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy
from sqlalchemy import Engine, MetaData, RowMapping, Table
from sqlalchemy.exc import SQLAlchemyError

from models.hashing import file_sha256
from tasks.params.redaction import redacted
from tasks.runtime import store
from tasks.runtime.errors import StageError

BATCH = 1000
REVISION = "alembic_version"
"""Table with the version of the schema."""
_SET_SEQUENCE = "SELECT setval(pg_get_serial_sequence(:table, :column), (SELECT max({column}) FROM {table}))"


@dataclass(frozen=True)
class Move:
    """A folder of artifacts that is copied to another one; rows name its files by absolute paths."""

    old: str
    """Absolute path in the rows of the source; that of an earlier place if its work tree was moved."""
    files: Path
    """The folder now."""
    new: Path
    root: str
    """What rows of the target name instead of `old`: the folder `new`, or an address that serves it."""

    def renamed(self, value: object) -> object:
        """Return a path below `old`, also with file://, as one below `root`; any other value unchanged."""
        if isinstance(value, str):
            path = value.removeprefix("file://")
            if path == self.old or path.startswith(f"{self.old}/"):
                return self.root.rstrip("/") + path[len(self.old) :]
        return value


@dataclass(frozen=True)
class Moved:
    """What was moved, after the comparison."""

    rows: dict[str, int]
    """Table -> number of rows; tables without rows are left out."""
    files: int
    size_bytes: int
    upgraded: bool


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m infra.migrate_store", description="Move an MLflow store to another, empty database."
    )
    parser.add_argument("source", help="address of the database, such as sqlite:///mlflow.db")
    parser.add_argument("target", help="address of an empty database, such as postgresql://user:password@host/mlflow")
    parser.add_argument("--artifacts", type=Path, metavar="FOLDER", help="copy the folder of artifacts there")
    parser.add_argument(
        "--artifact-root", metavar="ADDRESS", help="how the target names that folder, such as mlflow-artifacts:/"
    )
    given = parser.parse_args()
    try:
        moved = migrate(given.source, given.target, given.artifacts, given.artifact_root)
    except StageError as error:
        sys.exit(f"migrate_store: error: {redacted(str(error))}")
    except (SQLAlchemyError, OSError) as error:
        sys.exit(f"migrate_store: error: {redacted(str(error).splitlines()[0])}")
    for table, count in moved.rows.items():
        print(f"  {table:<32}{count:>9} rows equal")
    print(f"  {'artifacts':<32}{moved.files:>9} files equal ({moved.size_bytes / 1e6:.1f} MB)")
    upgraded = ", after an upgrade of a copy's schema" if moved.upgraded else ""
    print(f"migrate_store: moved to {redacted(given.target)}{upgraded}; set MLFLOW_TRACKING_URI to use it")


def migrate(source: str, target: str, artifacts: Path | None = None, artifact_root: str | None = None) -> Moved:
    """Copy the store `source` to the empty database `target`, and compare the two.

    Args:
        source: Address of the database.
        target: Address of an empty database.
        artifacts: New folder of the artifacts; None copies them for a SQLite target, and leaves them otherwise.
        artifact_root: How rows of the target name that folder; None uses its absolute path.

    Raises:
        StageError: if the source is no store of MLflow, the target is not empty, or the comparison finds a difference.
    """
    for uri in (source, target):
        store.require_usable(uri)
    with tempfile.TemporaryDirectory() as folder, _snapshot(source, Path(folder)) as (snapshot, address):
        move = _move(snapshot, source, target, artifacts, artifact_root)
        if move and move.new.exists() and any(move.new.iterdir()):
            raise StageError(f"{move.new} is not empty; name a new folder: --artifacts FOLDER")
        with _opened(_absolute(target)) as into:
            if sqlalchemy.inspect(into).get_table_names():
                raise StageError(f"{redacted(target)} is not empty; name a new database")
            try:
                return _copy_all(snapshot, address, into, target, move)
            except BaseException:  # also Ctrl-C: half a copy must not stay behind
                _discard(into, target)
                if move:
                    shutil.rmtree(move.new, ignore_errors=True)
                raise


def _absolute(uri: str) -> str:
    return f"{store.SQLITE}{_path(uri)}" if uri.startswith(store.SQLITE) else uri


def _path(uri: str) -> Path:
    return Path(uri.removeprefix(store.SQLITE)).resolve()


@contextmanager
def _opened(uri: str) -> Iterator[Engine]:
    engine = sqlalchemy.create_engine(uri)
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def _snapshot(source: str, folder: Path) -> Iterator[tuple[Engine, str]]:
    """Open the source; of a SQLite file a consistent copy, so that it is neither written nor changed meanwhile."""
    if source.startswith(store.SQLITE):
        path = _path(source)
        if not path.is_file():
            raise StageError(f"{path} does not exist; name the database of MLflow, such as sqlite:///mlflow.db")
        store.require_sound(path)
        copy = folder / "source.db"
        with (
            closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as old,
            closing(sqlite3.connect(copy)) as new,
        ):
            old.backup(new)
        address = f"{store.SQLITE}{copy}"
    else:
        address = source
    with _opened(address) as engine:
        if not {REVISION, "experiments", "runs"} <= set(sqlalchemy.inspect(engine).get_table_names()):
            raise StageError(f"{redacted(source)} holds no store of MLflow; name its database")
        yield engine, address


def _move(snapshot: Engine, source: str, target: str, artifacts: Path | None, root: str | None) -> Move | None:
    """Find the folder of the source's artifacts, and where it goes; None if the artifacts stay where they are."""
    with snapshot.connect() as connection:
        query = sqlalchemy.text("SELECT artifact_location FROM experiments ORDER BY experiment_id LIMIT 1")
        location = str(connection.execute(query).scalar() or "").removeprefix("file://")
    old = location.removesuffix("/0")
    folder = Path(old)
    if source.startswith(store.SQLITE) and folder.name == store.ARTIFACTS:  # as in a work tree, which may have moved
        beside = _path(source).parent / store.ARTIFACTS
        folder = beside if beside.is_dir() else folder
    if artifacts is None and target.startswith(store.SQLITE):
        artifacts = _path(target).parent / store.ARTIFACTS
    if artifacts is None or not location.startswith("/") or not folder.is_dir():
        if root or (artifacts and not target.startswith(store.SQLITE)):
            raise StageError("the source has no folder of artifacts on this machine; leave out --artifacts")
        return None
    new = artifacts.resolve()
    if new == folder or folder in new.parents:
        raise StageError(f"{new} is the source's own folder of artifacts; name another one: --artifacts FOLDER")
    return Move(old, folder, new, root or str(new))


def _copy_all(snapshot: Engine, address: str, into: Engine, target: str, move: Move | None) -> Moved:
    _create_tables(target, move)
    upgraded = _upgrade(snapshot, address, into, target)
    tables = MetaData()
    tables.reflect(into)
    extra = set(sqlalchemy.inspect(snapshot).get_table_names()) - set(tables.tables)
    if extra:
        raise StageError(f"the source has tables that this MLflow does not know ({', '.join(sorted(extra))})")
    old = MetaData()
    old.reflect(snapshot)
    _copy_rows(snapshot, old, into, tables, move)
    rows = _compare(snapshot, old, into, tables, move)
    files, size = _copy_files(move) if move else (0, 0)
    return Moved(rows, files, size, upgraded)


def _create_tables(target: str, move: Move | None) -> None:
    """Create the tables of the installed MLflow."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow reads it when it is imported
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # noqa: PLC0415 - a second, for --help too

    # Its folder is created at once; every path in the database is replaced by those of the source.
    with tempfile.TemporaryDirectory() as folder:
        SqlAlchemyStore(_absolute(target), move.root if move else folder).engine.dispose()


def _upgrade(snapshot: Engine, address: str, into: Engine, target: str) -> bool:
    """Bring the snapshot to the schema of the target; returns whether it was older."""
    if _revision(snapshot) == _revision(into):
        return False
    if not address.startswith(store.SQLITE):
        raise StageError(
            "the source was made by another version of MLflow; after a backup, run 'mlflow db upgrade' on it"
        )
    command = [sys.executable, "-m", "mlflow", "db", "upgrade", address]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    snapshot.dispose()
    if done.returncode or _revision(snapshot) != _revision(into):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise StageError(f"MLflow cannot upgrade the source to the schema of {redacted(target)}: {last}")
    return True


def _revision(engine: Engine) -> str:
    with engine.connect() as connection:
        return str(connection.execute(sqlalchemy.text(f"SELECT version_num FROM {REVISION}")).scalar())  # noqa: S608


def _copy_rows(snapshot: Engine, old: MetaData, into: Engine, tables: MetaData, move: Move | None) -> None:
    """Copy all rows in one transaction, tables before those that refer to them."""
    with into.begin() as connection:
        for table in reversed(tables.sorted_tables):
            connection.execute(table.delete())  # MLflow creates an experiment, and its migrations other rows
        for table in tables.sorted_tables:
            for batch in _batches(snapshot, old.tables[table.name], _names(table), move):
                connection.execute(table.insert(), batch)
        if into.dialect.name == "postgresql":
            for table in tables.sorted_tables:
                _set_sequences(connection, table)


def _set_sequences(connection: sqlalchemy.Connection, table: Table) -> None:
    """Have PostgreSQL number new rows after the copied ones."""
    for column in table.primary_key.columns:
        if isinstance(column.type, sqlalchemy.Integer):
            text = sqlalchemy.text(_SET_SEQUENCE.format(column=column.name, table=table.name))
            connection.execute(text, {"table": table.name, "column": column.name})


def _names(table: Table) -> list[str]:
    """Names of the columns that are stored, and not computed by the database."""
    return [column.name for column in table.columns if column.computed is None]


def _batches(engine: Engine, table: Table, names: list[str], move: Move | None) -> Iterator[list[dict[str, object]]]:
    """Yield all rows of a table as mappings, with the paths of artifacts as the target names them."""
    places = {column for owner, column in store.PLACES if owner == table.name}
    query = sqlalchemy.select(*(table.columns[name] for name in names))
    with engine.connect() as connection:
        result = connection.execution_options(yield_per=BATCH).execute(query)
        for batch in result.mappings().partitions():
            yield [_row(found, places, move) for found in batch]


def _row(found: RowMapping, places: set[str], move: Move | None) -> dict[str, object]:
    row = {str(name): value for name, value in found.items()}
    return row | {name: move.renamed(row[name]) for name in places} if move else row


def _compare(snapshot: Engine, old: MetaData, into: Engine, tables: MetaData, move: Move | None) -> dict[str, int]:
    """Return the number of rows of each table. Raises `StageError` if rows of the two databases differ."""
    counts = {}
    for table in tables.sorted_tables:
        names = _names(table)
        wanted = _digest(_batches(snapshot, old.tables[table.name], names, move))
        found = _digest(_batches(into, table, names, None))
        if wanted != found:
            raise StageError(
                f"table {table.name} differs after the copy: {wanted[0]} and {found[0]} rows; nothing was kept"
            )
        if found[0]:
            counts[table.name] = found[0]
    return counts


def _digest(batches: Iterator[list[dict[str, object]]]) -> tuple[int, int]:
    """Return the number of rows, and a hash that does not depend on their order: databases sort text differently."""
    count = total = 0
    for batch in batches:
        for row in batch:
            text = repr([(name, _canonical(row[name])) for name in sorted(row)])
            total += int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), "big")
            count += 1
    return count, total % (1 << 256)


def _canonical(value: object) -> object:
    """Return a value as every database gives it: truth values as numbers, binary data as bytes."""
    if isinstance(value, bool):
        return int(value)
    return bytes(value) if isinstance(value, memoryview | bytearray) else value


def _copy_files(move: Move) -> tuple[int, int]:
    """Copy the folder of artifacts; returns the number of files and their bytes. Raises `StageError` if one differs."""
    shutil.copytree(move.files, move.new, dirs_exist_ok=True)
    files = [path for path in sorted(move.files.rglob("*")) if path.is_file()]
    for path in files:
        copy = move.new / path.relative_to(move.files)
        if file_sha256(copy) != file_sha256(path):
            raise StageError(f"{copy} differs from {path}; repeat the command when no run writes artifacts")
    return len(files), sum(path.stat().st_size for path in files)


def _discard(into: Engine, target: str) -> None:
    """Leave an empty database behind after a failure, also of the connection."""
    into.dispose()
    if target.startswith(store.SQLITE):
        _path(target).unlink(missing_ok=True)
        return
    tables = MetaData()
    tables.reflect(into)
    tables.drop_all(into)


if __name__ == "__main__":
    main()
