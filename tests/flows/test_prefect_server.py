"""A real Prefect server and worker of `make serve`: a schedule, a cancelled run, a killed run.

The tests build on each other, in their order: what the scheduled run computed is cached for the others.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows import server
from tests.support import tiny

FINAL = {"COMPLETED", "FAILED", "CANCELLED", "CRASHED"}


class Served:
    """A tiny work tree whose Prefect server runs."""

    def __init__(self, root: Path, port: int, api: httpx.Client) -> None:
        self.root = root
        self.port = port
        self._api = api

    def post(self, path: str, **body: Any) -> Any:
        answer = self._api.post(path, json=body)
        while (
            answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
        ):  # its SQLite file is busy; its own clients wait too
            time.sleep(1)
            answer = self._api.post(path, json=body)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def runs(self, deployment: str) -> list[dict[str, Any]]:
        """Flow runs of a deployment that began to work; those that met one at work were cancelled before."""
        began = {"state": {"type": {"any_": ["RUNNING", "COMPLETED", "FAILED", "CRASHED"]}}}
        return self.post("/flow_runs/filter", deployments={"name": {"any_": [deployment]}}, flow_runs=began)

    def run(self, identity: str) -> dict[str, Any]:
        return self._api.get(f"/flow_runs/{identity}").raise_for_status().json()

    def trigger(self, deployment: str) -> str:
        return self.post(f"/deployments/{self._id(deployment)}/create_flow_run", state={"type": "SCHEDULED"})["id"]

    def pause(self, deployment: str) -> None:
        self.post(f"/deployments/{self._id(deployment)}/pause_deployment")

    def _id(self, deployment: str) -> str:
        return self.post("/deployments/filter", deployments={"name": {"any_": [deployment]}})[0]["id"]

    def log(self) -> str:
        return (self.root / server.LOGS / "worker.log").read_text(errors="replace")[-6000:]

    def wait(self, condition: Callable[[], Any], seconds: float, what: str) -> Any:
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, f"{what} did not happen within {seconds:.0f} s:\n{self.log()}"
            time.sleep(0.5)
        return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((server.HOST, 0))
        return probe.getsockname()[1]


def command(root: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=root, env=kept, capture_output=True, text=True, timeout=200
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tiny.tree(tmp_path_factory.mktemp("served"))
    schedule = root / "prefect.yaml"
    text, count = re.subn(r"- cron: .*\n\s+timezone: .*\n", "- interval: 15\n", schedule.read_text())
    assert count == 1
    schedule.write_text(text)
    port = free_port()
    try:
        done = command(root, "flows.serve", "--port", str(port))
        assert done.returncode == 0, done.stderr
        assert f"http://127.0.0.1:{port}" in done.stdout
        with httpx.Client(base_url=f"{server.url(port)}/api", timeout=30) as api:
            yield Served(root, port, api)
    finally:
        ours = [psutil.Process(process.pid) for process in server.running(root).values()]
        everything = [child for process in ours for child in [process, *process.children(recursive=True)]]
        done = command(root, "flows.stop")
        assert done.returncode == 0, done.stderr
        assert server.running(root) == {}
        assert psutil.wait_procs(everything, timeout=10)[1] == []


def stage_of(folder: Path, module: str) -> psutil.Process | None:
    """The process of a stage that works in `folder`."""
    for process in psutil.process_iter(["cmdline", "cwd"]):
        if process.info["cwd"] == str(folder) and (process.info["cmdline"] or [])[1:3] == ["-m", module]:
            return process
    return None


@pytest.mark.timeout(500)
def test_a_scheduled_run_finishes_by_itself_and_its_metrics_are_in_mlflow(served: Served) -> None:
    before = tiny.git(served.root, "status", "--porcelain")
    first = served.wait(lambda: next(iter(served.runs("nightly")), None), 90, "the start of a scheduled run")
    assert first["auto_scheduled"] is True
    served.pause("nightly")  # one is enough
    served.wait(lambda: served.run(first["id"])["state_type"] in FINAL, 420, "the end of the scheduled run")
    run = served.run(first["id"])
    assert run["state_type"] == "COMPLETED", run["state"]["message"]

    with sqlite3.connect(served.root / "mlflow.db") as store:
        metrics = {row[0] for row in store.execute("select key from latest_metrics")}
        lineage = {row[0]: row[1] for row in store.execute("select key, value from model_version_tags")}
        versions = store.execute("select count(*) from model_versions").fetchone()[0]
    assert {"loss", "frechet_distance", "frechet_distance_floor", "label_accuracy"} <= metrics
    assert lineage["afterimage.prefect_flow_run"] == run["id"]
    assert lineage["afterimage.git_dirty"] == "false"
    assert versions == 1
    assert tiny.git(served.root, "status", "--porcelain") == before, "a schedule writes no file of a person"
    assert not (served.root / "outputs").exists()

    artifacts = {entry["key"] for entry in served.post("/artifacts/filter") if entry["flow_run_id"] == run["id"]}
    assert {"stages", "metrics", "samples", "links"} <= artifacts


def start_training(served: Served) -> tuple[str, psutil.Process]:
    """A run of `on-demand` that trains for hours; its identity and its training process."""
    params = served.root / "params.yaml"
    if "steps: 12\n" in params.read_text():
        params.write_text(params.read_text().replace("steps: 12\n", "steps: 1000000\n"))
        tiny.git(served.root, "commit", "--quiet", "-m", "train for hours", "params.yaml")
    identity = served.trigger("on-demand")
    folder = served.root / ".prefect" / "workspaces" / "on-demand"
    return identity, served.wait(lambda: stage_of(folder, "tasks.train"), 150, "the start of the training")


@pytest.mark.timeout(300)
def test_known_stages_show_as_cached_and_cancelling_ends_the_training(served: Served) -> None:
    identity, training = start_training(served)
    tasks = served.post("/task_runs/filter", flow_runs={"id": {"any_": [identity]}})
    states = {task["name"]: task["state_name"] for task in tasks}
    assert states.pop("train") == "Running"
    assert {"download", "ingest", "validate", "codec", "encode"} <= set(states)
    assert set(states.values()) == {"Cached"}
    served.post(f"/flow_runs/{identity}/set_state", state={"type": "CANCELLING"}, force=True)
    served.wait(lambda: not training.is_running(), 40, "the end of the cancelled training")
    served.wait(lambda: served.run(identity)["state_type"] == "CANCELLED", 60, "the state Cancelled")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killing_a_run_ends_its_training(served: Served) -> None:
    identity, training = start_training(served)
    flow = next(process for process in training.parents() if "prefect.engine" in " ".join(process.cmdline()))
    flow.send_signal(signal.SIGKILL)
    served.wait(lambda: not training.is_running(), 30, "the end of the training whose flow was killed")
    served.wait(lambda: served.run(identity)["state_type"] == "CRASHED", 60, "the state Crashed")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_stop_ends_the_training_of_the_worker(served: Served) -> None:
    _, training = start_training(served)
    assert command(served.root, "flows.stop").returncode == 0
    assert not training.is_running()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_serve_starts_what_is_missing_and_leaves_what_runs(served: Served) -> None:
    assert command(served.root, "flows.serve", "--port", str(served.port)).returncode == 0
    before = server.running(served.root)
    server.stop(served.root, before["worker"])
    done = command(served.root, "flows.serve")
    assert done.returncode == 0, done.stderr
    assert f"http://127.0.0.1:{served.port}" in done.stdout
    after = server.running(served.root)
    assert after["server"] == before["server"]
    assert after["worker"] != before["worker"]
    other = command(served.root, "flows.serve", "--port", str(free_port()))
    assert other.returncode == 1
    assert "runs on port" in other.stderr


def test_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / server.PROCFILE).parent.mkdir()
    (tmp_path / server.PROCFILE).write_text("server: true\n")
    with socket.socket() as taken:
        taken.bind((server.HOST, 0))
        taken.listen()
        environment = {**os.environ, "PYTHONPATH": str(tiny.ROOT)}
        arguments = [sys.executable, "-m", "flows.serve", "--port", str(taken.getsockname()[1])]
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("serve: error: port ")
    assert "Traceback" not in done.stderr
