"""`make stack`: what it refuses, each in one sentence. tests/infra/test_stack_runs.py starts it."""

from __future__ import annotations

import importlib.util
import os
import pwd
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from flows import serve, server
from flows.stop import stop
from infra import stack, stack_database, stack_storage
from tasks.runtime.errors import StageError
from tests.support import tiny
from tests.support.commands import call

TESTS_OWN = ("AWS_", "CI", "DO_NOT_TRACK", "DVC_", "GX_", "HF_", "MLFLOW_", "ORT_", "PREFECT_", "PYTEST_")
"""Beginnings of variables that no user has; some of them switch off the usage reports of packages."""
SLEEPERS = "server: sleep 600\nworker: sleep 600\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((server.HOST, 0))
        return probe.getsockname()[1]


def free_ports() -> int:
    """The first of the free ports in a row that SeaweedFS uses."""
    while True:
        first = free_port()
        try:
            with ExitStack() as held:
                for port in range(first, first + stack_storage.PORTS):
                    held.enter_context(socket.socket()).bind((server.HOST, port))
        except OSError:
            continue
        return first


def command(
    root: Path, *arguments: str, module: str = "infra.stack", more: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(TESTS_OWN)}
    kept |= {"PYTHONPATH": str(tiny.ROOT), **(more or {})}
    call = [sys.executable, "-m", module, *arguments]
    return subprocess.run(call, cwd=root, env=kept, capture_output=True, text=True, timeout=900)


def refused(*arguments: object) -> str:
    """What the command prints in the present folder before it exits with 1: one sentence."""
    done = call(stack.main, *map(str, arguments))
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A folder with process files whose servers only sleep."""
    (tmp_path / "infra").mkdir()
    (tmp_path / server.PROCFILE).write_text(SLEEPERS)
    (tmp_path / stack.PROCFILE).write_text("storage: sleep 600\nmlflow: sleep 600\n")
    (tmp_path / server.STACK).mkdir(parents=True)
    (tmp_path / server.STACK / "mlflow.db").touch()  # so that no PostgreSQL is created
    program(tmp_path / "bin" / stack_storage.PROGRAM, "exit 0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("server_of", ["mlflow", "storage", "prefect"])
def test_a_port_in_use_is_one_sentence_and_nothing_starts(tree, server_of):
    with socket.socket() as taken:
        taken.bind((server.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        first = port - 2 if server_of == "storage" else free_ports()  # SeaweedFS uses the ports after that of S3, too
        mlflow, prefect = (port if name == server_of else free_port() for name in ("mlflow", "prefect"))
        said = refused("--storage-port", first, "--mlflow-port", mlflow, "--port", prefect)
    assert said.startswith("stack: error: port ") and " is in use; name another: " in said
    assert server.running(tree) == {}


def test_servers_that_ended_start_again_where_what_runs_looks_for_them(tree):
    prefect, mlflow, storage = free_port(), free_port(), free_ports()
    variables = server.environment(tree, prefect) | {"MLFLOW_TRACKING_URI": server.url(mlflow)}
    started = [server.start(tree, server.WORKER, variables)]
    try:
        up = server.running(tree)
        stack._require_same_servers(up, stack.Ports(None, mlflow, storage))
        with pytest.raises(StageError, match=r"^the worker that runs uses another mlflow .* end it first: make stop$"):
            stack._require_same_servers(up, stack.Ports(None, mlflow + 1, storage))
        assert serve.port_of(up, None) == serve.port_of(up, prefect) == prefect
        with pytest.raises(StageError, match=rf"^the worker of this work tree runs on port {prefect} already"):
            serve.port_of(up, prefect + 1)
        more = {"AWS_ENDPOINT_URL": server.url(storage)}
        started.append(server.start(tree, stack.MLFLOW, stack._variables(tree, mlflow, more), stack.PROCFILE))
        up = server.running(tree)
        stack._require_same_servers(up, stack.Ports(None, mlflow + 1, storage))
        with pytest.raises(StageError, match=r"^the mlflow that runs uses another storage "):
            stack._require_same_servers(up, stack.Ports(None, mlflow, storage + 1))
    finally:
        for process in started:
            server.stop(tree, process)


def test_a_worker_of_another_mlflow_is_refused_and_down_ends_everything(tree):
    worker = server.start(tree, server.WORKER, server.environment(tree, free_port()))
    assert refused().startswith("stack: error: the worker that runs uses another mlflow than the one to start")
    mlflow = server.start(tree, stack.MLFLOW, stack._variables(tree, free_port(), {}), stack.PROCFILE)
    assert call(stack.main, "--down").returncode == 0
    assert not server.alive(worker) and not server.alive(mlflow)
    assert server.running(tree) == {}


def test_a_server_that_ends_at_once_is_one_sentence(tree):
    (tree / stack.PROCFILE).write_text("storage: false\nmlflow: false\n")
    done = call(stack.main, "--storage-port", str(free_ports()), "--mlflow-port", str(free_port()))
    assert done.returncode == 1
    assert done.stderr == f"stack: error: storage did not start; {tree / server.LOGS / 'storage.log'} says why\n"
    assert "the databases are SQLite files, because" in done.stdout
    for name in ("s3.json", "storage"):
        assert (tree / server.STACK / name).stat().st_mode & 0o077 == 0, name


def test_a_missing_s3_server_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "search_path", lambda: str(tmp_path))
    with pytest.raises(StageError, match="make install EXTRA=stack"):
        stack_storage.identity(tmp_path)


def test_the_credentials_of_the_store_are_made_once(tree):
    folder = tree / server.STACK
    made = stack_storage.identity(folder)
    assert stack_storage.identity(folder) == made and len(made.secret) >= 32


def test_the_servers_do_not_get_the_users_own_access_to_s3(tree, monkeypatch):
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        monkeypatch.setenv(name, "mine")
    made = stack._of_mlflow(stack_storage.identity(tree / server.STACK), 9000, "sqlite:///x")
    assert "mine" not in stack._variables(tree, 5000, made).values()


def test_postgresql_ends_after_what_uses_it(tree, capsys):
    (tree / stack.PROCFILE).write_text("postgres: sleep 600\nstorage: sleep 600\nmlflow: sleep 600\n")
    for name in ("postgres", "storage", "mlflow"):
        server.start(tree, name, stack._variables(tree, free_port(), {}), stack.PROCFILE)
    server.start(tree, server.WORKER, server.environment(tree, free_port()))
    stop(tree)
    ended = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert ended[0] == "worker" and set(ended[2:]) == {"postgres", "storage"}


def test_a_server_in_a_folder_of_the_stack_belongs_to_the_work_tree(tree):
    """PostgreSQL's working directory is that of its files."""
    (tree / server.STACK / "postgres").mkdir()
    script = tree / "bin" / "moves"
    program(script, f"cd {tree / server.STACK / 'postgres'} && exec sleep 600")
    (tree / stack.PROCFILE).write_text(f"postgres: {script}\n")
    process = server.start(tree, "postgres", stack._variables(tree, 0, {}), stack.PROCFILE)
    try:
        deadline = time.monotonic() + 20
        while Path(f"/proc/{process.pid}/cwd").readlink() == tree:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert server.running(tree) == {"postgres": process} and server.elsewhere(tree) is None
    finally:
        server.stop(tree, process)


def test_the_database_is_postgresql_only_where_it_can_be(tmp_path, monkeypatch):
    folder, programs = tmp_path / "stack", tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(stack_database, "DEBIAN", tmp_path)
    monkeypatch.setattr(stack_database, "_programs", lambda _: None)
    assert "PostgreSQL is not installed" in str(stack_database.choose(folder))
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    for name, script in (("postgres", "echo postgres \\(PostgreSQL\\) 15.1"), ("createdb", ""), ("initdb", "exit 1")):
        program(programs / name, script)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "make install EXTRA=stack" in str(stack_database.choose(folder))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert stack_database.choose(folder) == "initdb failed"
    program(programs / "initdb", 'echo 15 > "$2/PG_VERSION"')
    cluster = stack_database.choose(folder)
    assert isinstance(cluster, stack_database.Postgres) and cluster.mlflow().endswith(f"?host={folder / 'postgres'}")
    assert stack_database.choose(folder) == cluster, "it is kept"
    (folder / "postgres" / "PG_VERSION").write_text("9\n")
    monkeypatch.setattr(stack_database, "DEBIAN", tmp_path / "none")
    with pytest.raises(StageError, match="PostgreSQL 9, which is not installed"):
        stack_database.choose(folder)
    (folder / "mlflow.db").touch()
    assert "exists already" in str(stack_database.choose(folder))


def test_root_runs_postgresql_as_another_user_who_must_be_able_to_enter(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    folder = tmp_path / "closed" / "stack"
    folder.mkdir(parents=True)
    nobody = pwd.struct_passwd(("postgres", "", 64321, 64321, "", "", ""))
    monkeypatch.setattr(pwd, "getpwnam", {"postgres": nobody}.__getitem__)
    for above in (*reversed(tmp_path.parents), tmp_path):
        if above.stat().st_uid == os.getuid() and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o001)
    (tmp_path / "closed").chmod(0o700)
    said = stack_database._create(tmp_path / "bin", folder / "postgres")
    assert said == f"root may not run it, and the user postgres may not enter {tmp_path / 'closed'}"
    monkeypatch.setattr(pwd, "getpwnam", {}.__getitem__)
    said = stack_database._create(tmp_path / "bin", folder / "postgres")
    assert said == "root may not run it, and there is no user postgres"
    assert not (folder / "postgres").exists()
