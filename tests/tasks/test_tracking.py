"""MLflow: found or refused at once, runs continued without duplicate points, and training independent of it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from PIL import Image

from tasks.runtime import tracking
from tasks.runtime.errors import Preempted, StageError
from tasks.training import tracked

ROOT = Path(__file__).parents[2]
PARAMS = {"train.learning_rate": 0.002, "train.steps": 100}
DATASET = {"name": "digits", "digest": "ab" * 32, "source": "data/latents"}


@pytest.fixture
def client(tmp_path, monkeypatch, migrated_database):
    shutil.copy(migrated_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    return tracking.connect()


def runs(client) -> list:
    return client.search_runs([tracking.experiment_id(client)])


def points(client, run_id: str, name: str = "train/loss") -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, name))


def train(key: str, steps: range) -> str:
    with tracked.training_run(key, PARAMS, DATASET) as run:
        for step in steps:
            run.metrics(step, {"loss": 1 / step})
    return run.run_id


def test_a_run_holds_parameters_curves_pictures_and_its_data(client, tmp_path):
    Image.new("L", (4, 4), 200).save(tmp_path / "grid.png")
    (tmp_path / "history.csv").write_text("step,loss\n")
    with tracked.training_run("k1", PARAMS, DATASET) as run:
        assert client.get_run(run.run_id).info.status == "RUNNING"
        run.metrics(10, {"loss": 0.5, "learning_rate": 0.002})
        run.image("samples", 10, tmp_path / "grid.png")
        run.artifact(tmp_path / "history.csv", "train")
    seen = client.get_run(run.run_id)
    assert seen.info.status == "FINISHED"
    assert seen.data.params == {name: str(value) for name, value in PARAMS.items()}
    assert seen.data.metrics["train/loss"] == 0.5
    assert seen.data.tags[tracking.TRAIN_KEY] == "k1"
    data = seen.inputs.dataset_inputs[0].dataset
    assert (data.name, data.digest) == ("digits", "ab" * 16)
    assert tracking.logged_images(client, run.run_id) == {("samples", 10)}
    assert [file.path for file in client.list_artifacts(run.run_id, "train")] == ["train/history.csv"]
    assert Path(seen.info.artifact_uri).is_relative_to(tmp_path / "mlruns")


def test_the_same_key_continues_the_run_and_repeats_no_point(client, tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "grid.png")
    first = train("k1", range(1, 6))
    with tracked.training_run("k1", PARAMS | {"train.log_every": 5}, DATASET) as run:
        for step in range(4, 9):
            run.metrics(step, {"loss": 1 / step})
        for _ in range(2):
            run.metrics(9, {"held_out_loss": 0.25})
        run.image("samples", 5, tmp_path / "grid.png")
    with tracked.training_run("k1", PARAMS, DATASET) as again:
        again.metrics(9, {"held_out_loss": 0.25})
        again.image("samples", 5, tmp_path / "grid.png")
    assert first == run.run_id == again.run_id
    assert points(client, first) == [(step, 1 / step) for step in range(1, 9)]
    assert points(client, first, "train/held_out_loss") == [(9, 0.25)]
    assert len([f for f in client.list_artifacts(first, "images") if f.path.endswith(".png")]) == 1
    assert client.get_run(first).data.params["train.log_every"] == "5"
    assert len(client.get_run(first).inputs.dataset_inputs) == 1
    assert train("k2", range(1, 3)) != first
    assert len(runs(client)) == 2


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, "KILLED"), (Preempted, "KILLED"), (StageError, "FAILED")]
)
def test_the_status_of_a_run_shows_how_it_ended(client, error, status):
    def interrupted():
        with tracked.training_run("k1", PARAMS, DATASET) as run:
            run.metrics(1, {"loss": 1.0})
            raise error

    with pytest.raises(error):
        interrupted()
    (ended,) = runs(client)
    assert ended.info.status == status
    assert points(client, ended.info.run_id) == [(1, 1.0)]


KILLED = """
import os, signal, time
from tasks.runtime import tracking
from tasks.training import tracked
tracking.connect()
with tracked.training_run("k1", {}, {"name": "digits", "digest": "ab"}) as run:
    for step in range(1, 4):
        run.metrics(step, {"loss": 1 / step})
    time.sleep(3)
    run.metrics(4, {"loss": 0.25})
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_run_whose_process_was_killed_ends(client):
    killed = subprocess.run([sys.executable, "-c", KILLED], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    (orphan,) = runs(client)
    assert orphan.info.status == "RUNNING"
    train("k2", range(1, 3))
    assert client.get_run(orphan.info.run_id).info.status == "KILLED"
    assert train("k1", range(2, 8)) == orphan.info.run_id
    assert client.get_run(orphan.info.run_id).info.status == "FINISHED"
    assert points(client, orphan.info.run_id) == [(step, 1 / step) for step in range(1, 8)]


def test_a_run_that_another_process_holds_is_not_changed(client):
    with tracked.training_run("k1", PARAMS, DATASET) as held:
        train("k2", range(1, 2))
        assert client.get_run(held.run_id).info.status == "RUNNING"


def test_a_deleted_run_or_experiment_comes_back(client):
    first = train("k1", range(1, 3))
    client.delete_run(first)
    second = train("k1", range(1, 3))
    assert second != first
    client.delete_experiment(tracking.experiment_id(client))
    third = train("k1", range(1, 3))
    assert client.get_run(third).info.lifecycle_stage == "active"


def test_system_metrics_are_sampled(client, monkeypatch):
    monkeypatch.setattr(tracked, "SYSTEM_METRICS_SECONDS", 0.2)
    with tracked.training_run("k1", PARAMS, DATASET) as run:
        deadline = time.monotonic() + 20
        name = "system/system_memory_usage_megabytes"
        while name not in client.get_run(run.run_id).data.metrics and time.monotonic() < deadline:
            time.sleep(0.2)
    assert client.get_run(run.run_id).data.metrics[name] > 0


def test_training_survives_the_loss_of_mlflow(client, tmp_path, capsys):
    Image.new("L", (4, 4)).save(tmp_path / "grid.png")
    with tracked.training_run("k1", PARAMS, DATASET) as run:
        run.metrics(1, {"loss": 1.0})
        (tmp_path / "mlflow.db").write_bytes(b"")
        for step in (2, 3):
            run.metrics(step, {"loss": 0.5})
            run.image("samples", step, tmp_path / "grid.png")
    assert capsys.readouterr().err.count("mlflow: lost") == 1


KILLED_SERVER = """
import os, signal, sys, time
from tasks.runtime import tracking
from tasks.training import tracked
tracked.SYSTEM_METRICS_SECONDS = 0.3
tracking.connect()
with tracked.training_run("k1", {}, {"name": "digits", "digest": "ab"}) as run:
    run.metrics(1, {"loss": 1.0})
    time.sleep(2)
    os.killpg(int(sys.argv[1]), signal.SIGKILL)
    for step in range(2, 12):
        run.metrics(step, {"loss": 1 / step})
        time.sleep(0.5)
print("trained to the end")
"""


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_a_server_that_is_killed_during_training_is_one_sentence(tmp_path, migrated_database):
    shutil.copy(migrated_database, tmp_path / "mlflow.db")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ["--backend-store-uri", f"sqlite:///{tmp_path / 'mlflow.db'}", "--host", "127.0.0.1", "--port", port]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "AFTERIMAGE_SCRATCH": str(tmp_path)}
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *options, "--workers", "1"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not answers(int(port)) and time.monotonic() < deadline:
            time.sleep(0.2)
        done = subprocess.run(
            [sys.executable, "-c", KILLED_SERVER, str(server.pid)],
            cwd=ROOT,
            env=environment | {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"},
            capture_output=True,
            text=True,
        )
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert done.stdout == "trained to the end\n"
    sentence = (
        "mlflow: lost (its server does not answer); training continues, register replays the rest, except the curves "
        "of speed and memory"
    )
    assert done.stderr.strip() == sentence


def test_a_closed_port_is_reported_at_once(monkeypatch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://somebody:secret@127.0.0.1:{port}")
    started = time.monotonic()
    with pytest.raises(StageError, match=rf"127\.0\.0\.1:{port} does not answer .*MLFLOW_TRACKING_URI") as caught:
        tracking.connect()
    assert time.monotonic() - started < 3
    assert "secret" not in str(caught.value)


def test_a_server_that_does_not_answer_is_given_up_after_2_s(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(StageError, match="does not answer within 2 s"):
            tracking.connect()
    assert 1.5 < time.monotonic() - started < 4


@pytest.mark.parametrize(("code", "remedy"), [(403, "--allowed-hosts"), (502, "answers 502; start it")])
def test_a_server_that_refuses_is_reported_with_a_remedy(monkeypatch, code, remedy):
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(code)

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(StageError, match=remedy):
            tracking.connect()


def test_a_database_of_another_mlflow_is_reported_with_a_remedy(tmp_path, monkeypatch, migrated_database):
    path = tmp_path / "old.db"
    shutil.copy(migrated_database, path)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE alembic_version SET version_num = 'c48cb773bb87'")
    database.close()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path))
    with pytest.raises(StageError, match="mlflow db upgrade"):
        tracking.connect()


@pytest.mark.slow
def test_the_tables_of_a_fresh_database_are_made_while_training_prepares(tmp_path):
    path = tmp_path / "mlflow.db"
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{path}", "AFTERIMAGE_SCRATCH": str(tmp_path)}
    code = """if True:
        import sys, time
        from pathlib import Path
        from tasks.runtime import tracking
        tracking.prepare()
        until = time.monotonic() + 100
        while not Path(sys.argv[1]).exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert "mlflow" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, env=environment, check=True)
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT version_num FROM alembic_version").fetchall()
    database.close()


@pytest.mark.slow
def test_several_processes_on_a_fresh_database_make_it_once(tmp_path):
    """Without the lock they would damage it permanently."""
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
        "AFTERIMAGE_SCRATCH": str(tmp_path),
    }
    code = "from tasks.runtime import tracking as t; c = t.connect(); print(t.experiment_id(c))"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(3)
    ]
    said = [process.communicate(timeout=200) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len({out for out, _ in said}) == 1
    assert sum(b"creating the database" in err for _, err in said) == 1


@pytest.mark.slow
def test_a_migration_that_was_killed_is_started_again(tmp_path):
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
        "AFTERIMAGE_SCRATCH": str(tmp_path),
    }
    command = [sys.executable, "-c", "from tasks.runtime import tracking; tracking.connect()"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    half = tmp_path / "mlflow.db.new"
    while not (half.exists() and half.stat().st_size > 100_000):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "mlflow.db").exists()
    assert subprocess.run(command, cwd=ROOT, env=environment).returncode == 0
    assert (tmp_path / "mlflow.db").exists()
    assert not half.exists()


BEFORE_CONNECTING = """
import sys
from pathlib import Path
from tasks import register
from tasks.registration import unchanged
unchanged.Registration.recorded = lambda self: None
register.tracking.connect = lambda: sys.exit("mlflow" in sys.modules)
register.register(*[Path()] * 11, None)
"""


def test_register_imports_mlflow_after_its_environment_is_set():
    """MLflow reads at its import whether it may report its usage."""
    assert subprocess.run([sys.executable, "-c", BEFORE_CONNECTING], cwd=ROOT).returncode == 0
