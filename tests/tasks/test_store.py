"""MLflow's database: an unusable one is refused in one sentence, and nothing is written outside the work tree."""

from __future__ import annotations

import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tasks.runtime import store, tracking
from tasks.runtime.errors import StageError
from tasks.training import tracked

ROOT = Path(__file__).parents[2]
DATASET = {"name": "digits", "digest": "ab" * 32}


def work_tree(folder: Path, database: Path) -> Path:
    """A folder with an MLflow database, as after a first run."""
    folder.mkdir(parents=True)
    shutil.copy(database, folder / "mlflow.db")
    home = str(folder / "mlruns")
    with closing(sqlite3.connect(folder / "mlflow.db")) as opened, opened:
        opened.execute("UPDATE experiments SET artifact_location = ?", (f"{home}/0",))
    return folder


@pytest.fixture
def run_in(monkeypatch) -> Callable[[Path, str], str]:
    """Return a function that creates and finishes a run in a work tree, and returns where its model would be.

    MLFLOW_TRACKING_URI is not set.
    """

    def call(folder: Path, key: str) -> str:
        for name in ("MLFLOW_TRACKING_URI", "AFTERIMAGE_SCRATCH"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.chdir(folder)
        client = tracking.connect()
        with tracked.training_run(key, {}, DATASET) as run:
            client.log_dict(run.run_id, {"a": 1}, "lineage/a.json")
        made = client.create_logged_model(tracking.experiment_id(client), name="m", source_run_id=run.run_id)
        return made.artifact_location

    return call


def files(folder: Path) -> dict[str, tuple[int, float]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("how", [pytest.param("copied", marks=pytest.mark.slow), "moved"])
def test_a_tree_that_was_moved_or_copied_writes_nothing_outside_itself(
    how, tmp_path, migrated_database, run_in, capsys
):
    old = work_tree(tmp_path / "old" / "tree", migrated_database)
    run_in(old, "one")
    capsys.readouterr()
    new = tmp_path / "new" / "tree"
    (shutil.copytree if how == "copied" else shutil.move)(old, new)
    before = files(tmp_path / "old")
    assert run_in(new, "two").startswith(str(new / "mlruns"))
    assert capsys.readouterr().err.count("the work tree was moved or copied") == 1
    assert files(tmp_path / "old") == before
    with closing(sqlite3.connect(new / "mlflow.db")) as database:
        places = [row[0] for row in database.execute("SELECT artifact_location FROM experiments")]
        places += [row[0] for row in database.execute("SELECT artifact_uri FROM runs")]
    assert len(places) >= 4 and all(place.startswith(str(new)) for place in places)
    assert store.update_artifact_paths(new / "mlflow.db") == 0


def test_artifacts_in_another_place_are_not_changed(tmp_path, migrated_database):
    tree = work_tree(tmp_path / "tree", migrated_database)
    for elsewhere in ("s3://bucket/mlruns", str(tmp_path / "artifacts")):
        with closing(sqlite3.connect(tree / "mlflow.db")) as opened, opened:
            opened.execute("UPDATE experiments SET artifact_location = ?", (f"{elsewhere}/0",))
        assert store.update_artifact_paths(tree / "mlflow.db") == 0


@pytest.mark.parametrize("name", ["a?b", "a%20b"])
def test_a_path_that_mlflow_would_misread_is_refused_and_nothing_is_written(name, tmp_path, run_in):
    folder = tmp_path / name / "tree"
    folder.mkdir(parents=True)
    with pytest.raises(StageError, match=re.escape(f"MLflow would not find its database at {folder}/mlflow.db")):
        run_in(folder, "one")
    assert files(tmp_path) == {}


def test_unusual_paths_work(tmp_path, migrated_database, run_in):
    name = "a b#ü, 50% off"
    folder = work_tree(tmp_path / name / "tree", migrated_database)
    assert run_in(folder, "one").startswith(str(folder / "mlruns"))
    assert {path.name for path in tmp_path.iterdir()} == {name}


def refused(uri: str, monkeypatch, tmp_path) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    with pytest.raises(StageError) as error:
        tracking.connect()
    assert "\n" not in str(error.value) and "SECRET" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("scheme", "package"),
    [("postgresql", "psycopg2-binary"), ("postgresql+psycopg", "psycopg[binary]"), ("mysql", "mysqlclient")],
)
def test_a_database_without_its_driver_names_the_package(scheme, package, monkeypatch, tmp_path):
    find = store.importlib.util.find_spec
    drivers = {module for module, _ in (("psycopg2", 0), ("psycopg", 0), ("MySQLdb", 0))}
    monkeypatch.setattr(store.importlib.util, "find_spec", lambda name: None if name in drivers else find(name))
    message = refused(f"{scheme}://user:SECRET@SECRET@127.0.0.1:9/db", monkeypatch, tmp_path)
    assert package in message and "pip install" in message and "MLFLOW_TRACKING_URI" in message


def test_a_database_server_that_does_not_answer_is_reported_at_once(monkeypatch, tmp_path):
    find = store.importlib.util.find_spec
    monkeypatch.setattr(store.importlib.util, "find_spec", lambda name: name if name == "psycopg2" else find(name))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    message = refused(f"postgresql://user:SECRET@127.0.0.1:{port}/db", monkeypatch, tmp_path)
    assert f"postgresql://***@127.0.0.1:{port}/db does not answer" in message


def test_an_address_that_mlflow_does_not_know_is_one_sentence(monkeypatch, tmp_path):
    assert "refuses" in refused("nonsense://SECRET@x", monkeypatch, tmp_path)


@pytest.mark.parametrize("damage", ["overwritten", "cut", "zeroed"])
def test_a_damaged_database_is_one_sentence(damage, monkeypatch, tmp_path, migrated_database):
    data = bytearray(migrated_database.read_bytes())
    if damage == "overwritten":
        data[:100] = b"x" * 100
    elif damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[8192 : len(data) // 2] = bytes(len(data) // 2 - 8192)
    (tmp_path / "mlflow.db").write_bytes(data)
    message = refused(f"sqlite:///{tmp_path / 'mlflow.db'}", monkeypatch, tmp_path)
    assert f"the MLflow database {tmp_path / 'mlflow.db'} is damaged" in message and "move it away" in message


def test_a_transaction_of_a_killed_process_is_undone(tmp_path):
    path = tmp_path / "mlflow.db"
    writer = (
        "import os, sqlite3, sys\n"
        "database = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "database.execute('CREATE TABLE numbers (text)')\n"
        "database.execute('PRAGMA cache_size = 1')\n"
        "database.execute('BEGIN')\n"
        "database.executemany('INSERT INTO numbers VALUES (?)', [('x' * 4000,)] * 50)\n"
        "os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", writer, str(path)], check=True)
    assert path.with_name("mlflow.db-journal").stat().st_size > 0
    store.require_sound(path)
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT count(*) FROM numbers").fetchone() == (0,)


def test_an_old_schema_and_a_password_with_an_at_sign_are_one_sentence(monkeypatch, tmp_path, migrated_database):
    """The message contains no password: it names the environment variable instead of the address."""
    shutil.copy(migrated_database, tmp_path / "old.db")
    with closing(sqlite3.connect(tmp_path / "old.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'c48cb773bb87'")
    message = refused(f"sqlite:///{tmp_path / 'old.db'}", monkeypatch, tmp_path)
    assert 'mlflow db upgrade "$MLFLOW_TRACKING_URI"' in message
    message = refused("http://user:SECRET@SECRET@127.0.0.1:9", monkeypatch, tmp_path)
    assert "http://***@127.0.0.1:9 does not answer" in message


@pytest.mark.parametrize("module", ["infra.run", "infra.ui", "flows.pipeline"])
def test_commands_refuse_an_unusable_database_before_they_begin(module, tmp_path):
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/a?b.db",
        "AFTERIMAGE_SCRATCH": str(tmp_path),
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = ["--port", str(free.getsockname()[1])] if module == "infra.ui" else []
    command = [sys.executable, "-m", module, *port]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert re.match(r"\w+: error: MLflow would not find its database at ", done.stderr)


def test_the_ui_address_is_that_of_the_server(tmp_path):
    environment = os.environ | {"MLFLOW_TRACKING_URI": "http://me:SECRET@mlflow.example.org:5000"}
    command = [sys.executable, "-m", "infra.ui"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.strip().endswith("open http://mlflow.example.org:5000")
