"""Moving an MLflow store: everything arrives, the source is not written, and a failure leaves nothing behind."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import shutil
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from infra import migrate_store, stack_database
from tasks.runtime import tracking
from tests.support.commands import call
from tests.support.postgres import open_folder

NAME = "afterimage-test"
LOSS = "train/loss"


def client_of(uri: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return tracking.connect()


@pytest.fixture
def filled(tmp_path, migrated_database, monkeypatch) -> Path:
    """A store with runs, an image, versions and aliases."""
    folder = tmp_path / "old"
    folder.mkdir()
    shutil.copy(migrated_database, folder / "mlflow.db")
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    client = client_of(f"sqlite:///{folder / 'mlflow.db'}", monkeypatch)
    experiment = tracking.experiment_id(client)
    for number in range(3):
        run = client.create_run(experiment, tags={"afterimage.kind": "training", "word": "größe 😀"})
        identity = run.info.run_id
        client.log_param(identity, "train.steps", number)
        for step, value in enumerate((0.1 + number, 1 / 3, math.nan, math.inf)):
            client.log_metric(identity, LOSS, value, step=step)
        client.log_image(identity, np.full((4, 4, 3), number, np.uint8), key="samples", step=number)
        client.log_text(identity, f"notes {number}", "notes.txt")
        client.set_terminated(identity, "FAILED" if number == 2 else "FINISHED")
    client.create_registered_model(NAME, tags={"afterimage.champion.0001": '{"version": 2}'}, description="Words")
    for _ in range(2):
        client.create_model_version(NAME, source=str(folder / "mlruns"), run_id=identity, tags={"a": "b"})
    client.set_registered_model_alias(NAME, "champion", "2")
    client.set_registered_model_alias(NAME, "challenger", "1")
    client.delete_run(client.create_run(experiment).info.run_id)
    return folder / "mlflow.db"


def contents(client) -> dict[str, object]:
    """What MLflow's client reads, in comparable form; NaN as a word."""
    model = client.get_registered_model(NAME)
    runs = client.search_runs([tracking.experiment_id(client)], run_view_type=3)
    versions = client.search_model_versions(f"name = '{NAME}'")
    return {
        "runs": {
            run.info.run_id: (
                run.info.status,
                run.info.lifecycle_stage,
                run.data.params,
                run.data.tags,
                [
                    (m.step, repr(m.value), m.timestamp)
                    for m in client.get_metric_history(run.info.run_id, "train/loss")
                ],
                sorted(file.path for file in client.list_artifacts(run.info.run_id)),
                sorted(file.path for file in client.list_artifacts(run.info.run_id, "images")),
            )
            for run in runs
        },
        "model": (model.tags, model.description, {name: int(version) for name, version in model.aliases.items()}),
        "versions": {int(v.version): (v.tags, v.run_id, v.creation_timestamp) for v in versions},
    }


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_everything_arrives_in_another_file_and_a_full_target_is_refused(filled, tmp_path, monkeypatch):
    source, target = f"sqlite:///{filled}", f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    expected, before = contents(client_of(source, monkeypatch)), digest(filled)
    (tmp_path / "new").mkdir()
    done = call(migrate_store.main, source, target)
    assert done.returncode == 0, done.stderr
    assert "rows equal" in done.stdout and " 9 files equal" in done.stdout
    shutil.move(filled.parent, tmp_path / "away")  # the new store needs nothing of the old one
    client = client_of(target, monkeypatch)
    assert contents(client) == expected
    run = next(iter(expected["runs"]))
    place = client.get_run(run).info.artifact_uri
    assert place.startswith(str(tmp_path / "new" / "mlruns"))
    assert digest(tmp_path / "away" / "mlflow.db") == before, "the source is not written"
    assert client.create_model_version(NAME, source=place).version in ("3", 3)

    # The source has moved, and its rows still name the earlier place.
    again = call(migrate_store.main, f"sqlite:///{tmp_path / 'away' / 'mlflow.db'}", target, "--artifacts", "x")
    assert again.returncode == 1
    assert again.stderr == f"migrate_store: error: {target} is not empty; name a new database\n"


def test_a_damaged_copy_is_noticed_and_nothing_stays(filled, tmp_path, monkeypatch):
    target = tmp_path / "new" / "mlflow.db"
    target.parent.mkdir()
    copy = migrate_store._copy_rows

    def spoiled(snapshot, old, into, tables, move) -> None:
        copy(snapshot, old, into, tables, move)
        with into.begin() as connection:
            connection.execute(tables.tables["params"].update().values(value="7"))

    monkeypatch.setattr(migrate_store, "_copy_rows", spoiled)
    done = call(migrate_store.main, f"sqlite:///{filled}", f"sqlite:///{target}")
    complaint = "migrate_store: error: table params differs after the copy: 3 and 3 rows; nothing was kept"
    assert done.stderr.splitlines()[-1] == complaint, "MLflow may have logged how it creates its tables"
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "sentence"),
    [(None, "does not exist; name the database"), ("CREATE TABLE words (word)", "holds no store of MLflow")],
)
def test_a_source_that_is_no_store_is_one_sentence(make, sentence, tmp_path):
    source = tmp_path / "some.db"
    if make:
        with closing(sqlite3.connect(source)) as database:
            database.execute(make)
    done = call(migrate_store.main, f"sqlite:///{source}", f"sqlite:///{tmp_path / 'new.db'}")
    assert done.returncode == 1 and sentence in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "new.db").exists()


@pytest.mark.slow
def test_a_store_of_an_older_schema_is_upgraded_in_a_copy(tmp_path, monkeypatch):
    import sqlalchemy
    from alembic import command
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base

    source = tmp_path / "old.db"
    engine = sqlalchemy.create_engine(f"sqlite:///{source}")
    Base.metadata.create_all(engine)
    config = _get_alembic_config(f"sqlite:///{source}")
    older = list(ScriptDirectory.from_config(config).walk_revisions())[8].revision
    command.upgrade(config, older)
    with engine.begin() as connection:
        connection.execute(
            sqlalchemy.text(
                "INSERT INTO experiments (experiment_id, name, lifecycle_stage) VALUES (5, 'ours', 'active')"
            )
        )
    engine.dispose()
    before = digest(source)
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    moved = migrate_store.migrate(f"sqlite:///{source}", f"sqlite:///{tmp_path / 'new.db'}")
    assert moved.upgraded and moved.rows["experiments"] == 1
    assert digest(source) == before
    client = client_of(f"sqlite:///{tmp_path / 'new.db'}", monkeypatch)
    assert client.get_experiment_by_name("ours").experiment_id == "5"


@pytest.fixture
def postgres() -> Iterator[str]:
    """The address of a new database of PostgreSQL on a free port; its server refuses to run as root."""
    programs = stack_database._programs(None)
    if programs is None or importlib.util.find_spec("psycopg2") is None:
        pytest.skip("needs PostgreSQL and psycopg2")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with open_folder() as above:
        folder = above / "postgres"
        folder.mkdir()
        if owner := stack_database.user():
            shutil.chown(folder, owner.pw_uid, owner.pw_gid)

        def run(*command: str) -> None:
            done = stack_database._run(programs, [*command])
            assert done.returncode == 0, done.stderr

        run("initdb", "-D", str(folder), "-U", "mlflow", "-A", "trust", "-N")
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        # Its output would stay open in the server.
        run("pg_ctl", "-D", str(folder), "-o", options, "-l", str(folder / "log"), "-w", "start")
        try:
            yield f"postgresql://mlflow:secret-word@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "-D", str(folder), "-m", "immediate", "stop")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_everything_arrives_in_postgresql_and_new_rows_get_new_numbers(filled, tmp_path, monkeypatch, postgres):
    source = f"sqlite:///{filled}"
    expected = contents(client_of(source, monkeypatch))
    done = call(migrate_store.main, source, postgres, "--artifacts", str(tmp_path / "files"))
    assert done.returncode == 0, done.stderr
    assert "secret-word" not in done.stdout + done.stderr
    shutil.move(filled.parent, tmp_path / "away")
    client = client_of(postgres, monkeypatch)
    assert contents(client) == expected
    assert int(client.create_experiment("another")) > int(tracking.experiment_id(client))
    assert call(migrate_store.main, f"sqlite:///{tmp_path / 'away' / 'mlflow.db'}", postgres).returncode == 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_interrupted_move_leaves_an_empty_database_that_can_be_used_again(filled, tmp_path, postgres, monkeypatch):
    """Ctrl-C, and a kill of the database's connection, in the middle of the rows."""
    import sqlalchemy

    source, files = f"sqlite:///{filled}", tmp_path / "files"
    whole = migrate_store._batches

    def interrupted(engine, table, names, move):
        if table.name == "metrics":
            raise KeyboardInterrupt
        yield from whole(engine, table, names, move)

    monkeypatch.setattr(migrate_store, "_batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        migrate_store.migrate(source, postgres, files)
    engine = sqlalchemy.create_engine(postgres)
    assert sqlalchemy.inspect(engine).get_table_names() == [] and not files.exists()

    def cut(engine_of, table, names, move):
        if table.name == "metrics" and engine_of.dialect.name == "sqlite":
            with engine.connect() as other:
                query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                other.execute(sqlalchemy.text(query))
        yield from whole(engine_of, table, names, move)

    monkeypatch.setattr(migrate_store, "_batches", cut)
    done = call(migrate_store.main, source, postgres, "--artifacts", str(files))
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("migrate_store: error: ")
    assert sqlalchemy.inspect(engine).get_table_names() == [] and not files.exists()
    monkeypatch.undo()

    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE mine (word text)"))
    done = call(migrate_store.main, source, postgres, "--artifacts", str(files))
    assert done.returncode == 1 and done.stderr.endswith("is not empty; name a new database\n")
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("DROP TABLE mine"))
    engine.dispose()
    assert call(migrate_store.main, source, postgres, "--artifacts", str(files)).returncode == 0
