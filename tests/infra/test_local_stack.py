"""`make stack`: MLflow with proxied artifacts, S3 and Prefect on this machine, and their end."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flows import server
from infra import stack, stack_database
from tests.support import tiny

SLEEPERS = "server: sleep 600\nworker: sleep 600\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((server.HOST, 0))
        return probe.getsockname()[1]


def command(root: Path, *arguments: str, module: str = "infra.stack") -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "AWS_"))}
    kept["PYTHONPATH"] = str(tiny.ROOT)
    call = [sys.executable, "-m", module, *arguments]
    return subprocess.run(call, cwd=root, env=kept, capture_output=True, text=True, timeout=500)


@pytest.fixture
def tree(tmp_path) -> Path:
    """A folder with process files whose servers only sleep."""
    (tmp_path / "infra").mkdir()
    (tmp_path / server.PROCFILE).write_text(SLEEPERS)
    (tmp_path / stack.PROCFILE).write_text("storage: sleep 600\nmlflow: sleep 600\n")
    (tmp_path / stack.FOLDER).mkdir(parents=True)
    (tmp_path / stack.FOLDER / "mlflow.db").touch()  # so that no PostgreSQL is created
    return tmp_path


def test_a_port_in_use_is_one_sentence_and_nothing_starts(tree):
    with socket.socket() as taken:
        taken.bind((server.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = command(tree, "--storage-port", str(port))
    assert done.returncode == 1
    assert done.stderr == f"stack: error: port {port} is in use; name another: --storage-port {port + 1}\n"
    assert server.running(tree) == {}


def test_a_worker_of_another_mlflow_is_refused_and_down_ends_everything(tree):
    worker = server.start(tree, server.WORKER, server.environment(tree, free_port()))
    done = command(tree)
    assert done.returncode == 1
    assert done.stderr.startswith("stack: error: a worker of make serve runs") and done.stderr.count("\n") == 1
    mlflow = server.start(tree, stack.MLFLOW, stack._variables(tree, free_port(), "sqlite:///x"), stack.PROCFILE)
    assert command(tree, "--down").returncode == 0
    assert not server.alive(worker) and not server.alive(mlflow)
    assert server.running(tree) == {}


def test_a_server_that_ends_at_once_is_one_sentence(tree):
    (tree / stack.PROCFILE).write_text("storage: false\nmlflow: false\n")
    done = command(tree, "--storage-port", str(free_port()))
    assert done.returncode == 1
    assert done.stderr == f"stack: error: storage did not start; {tree / server.LOGS / 'storage.log'} says why\n"


def test_the_database_is_postgresql_only_where_it_can_be(tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    sqlite = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert stack_database.choose(tmp_path) == (sqlite, "PostgreSQL's programs are not on the PATH")
    initdb = programs / "initdb"
    initdb.write_text("#!/bin/sh\necho 'initdb: error: cannot be run as root' >&2\nexit 1\n")
    initdb.chmod(0o755)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "pip install psycopg2-binary" in str(stack_database.choose(tmp_path)[1])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    assert stack_database.choose(tmp_path) == (sqlite, "initdb: error: cannot be run as root")
    initdb.write_text("#!/bin/sh\nexit 0\n")
    assert stack_database.choose(tmp_path) == (f"postgresql://afterimage@/mlflow?host={tmp_path}", None)
    (tmp_path / "mlflow.db").touch()
    assert stack_database.choose(tmp_path) == (sqlite, "it exists already")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_stack_keeps_artifacts_and_objects_and_ends(tmp_path, monkeypatch):
    import boto3

    root = tiny.tree(tmp_path / "tree")
    ports = {name: str(free_port()) for name in ("--port", "--mlflow-port", "--storage-port")}
    try:
        done = command(root, *(word for pair in ports.items() for word in pair))
        assert done.returncode == 0, done.stderr
        mlflow = re.search(r"export MLFLOW_TRACKING_URI=(\S+)", done.stdout)
        storage = re.search(r"export AWS_ENDPOINT_URL=(\S+)", done.stdout)
        assert mlflow and storage and f"http://127.0.0.1:{ports['--port']}" in done.stdout
        assert set(server.running(root)) == {"storage", "mlflow", "server", "worker"}
        worker = Path(f"/proc/{server.running(root)['worker'].pid}/environ").read_bytes()
        assert f"MLFLOW_TRACKING_URI={mlflow[1]}\0".encode() in worker, "its runs go to this MLflow"
        _use(mlflow[1], monkeypatch)
        client = boto3.client(
            "s3", endpoint_url=storage[1], aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1"
        )
        client.create_bucket(Bucket="ours")
        client.put_object(Bucket="ours", Key="a", Body=b"words")
        assert client.get_object(Bucket="ours", Key="a")["Body"].read() == b"words"
        before = server.running(root)
        assert command(root).returncode == 0
        assert server.running(root) == before, "what runs is kept"
    finally:
        done = command(root, "--down")
    assert done.returncode == 0 and server.running(root) == {}
    assert list((root / stack.FOLDER / "artifacts").rglob("notes.txt"))


def _use(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.runtime import tracking

    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    client = tracking.connect()
    run = client.create_run(tracking.experiment_id(client)).info
    client.log_text(run.run_id, "words", "notes.txt")
    assert client.get_run(run.run_id).info.artifact_uri.startswith("mlflow-artifacts:/")
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["notes.txt"]
