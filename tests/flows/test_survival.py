"""What a team meets with a real Prefect server and worker: servers away, lost files, missed runs, other machines.

The chain is a toy whose stage `slow` waits for a file, so that each test decides how long a run takes. The tests of
this file use one server, in their order.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import psutil
import pytest

from flows import dvc, server
from tests.flows.test_prefect_server import FINAL, Served, command, free_port
from tests.support import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]  # a server of its own, which is away for minutes

OPERATIONS = tiny.ROOT / "docs" / "operations.md"
START = 600.0
"""Seconds for the start of a run on a busy machine."""
TOY = """\
stages:
  download:
    cmd: cp {outside}/source.txt raw.txt
    deps: ["{outside}/source.txt"]
    outs: [raw.txt]
  ingest:
    cmd: python toy.py ingest
    deps: [raw.txt]
    outs: [data/images]
  validate:
    cmd: cp raw.txt accepted.txt
    deps: [data/images, raw.txt]
    outs: [accepted.txt]
  slow:
    cmd: python toy.py slow {outside}
    deps: [accepted.txt]
    outs: [slow.txt]
  last:
    cmd: cp slow.txt last.txt
    deps: [slow.txt]
    outs: [last.txt]
"""
STAGES = """\
import hashlib, json, pathlib, sys, time
if sys.argv[1] == "ingest":
    folder = pathlib.Path("data/images")
    folder.mkdir(parents=True)
    text = pathlib.Path("raw.txt").read_bytes()
    (folder / "index.json").write_text(json.dumps({"sha256": hashlib.sha256(text).hexdigest()}))
else:
    outside = pathlib.Path(sys.argv[2])
    with (outside / "begun").open("a") as file:
        file.write("x")
    while not (outside / "go").exists():
        time.sleep(0.2)
    pathlib.Path("slow.txt").write_text(pathlib.Path("accepted.txt").read_text() + "slow")
"""


class Toy(Served):
    """A served work tree with the toy chain, and the files outside of it that control the chain."""

    @property
    def outside(self) -> Path:
        return self.root.parent

    def source(self, text: str) -> None:
        (self.outside / "source.txt").write_text(text)

    def begun(self) -> int:
        """How often the stage `slow` was started."""
        file = self.outside / "begun"
        return len(file.read_text()) if file.exists() else 0

    def ended(self, identity: str, seconds: float = START) -> dict[str, object]:
        self.wait(lambda: self.run(identity)["state_type"] in FINAL, seconds, "the end of the run")
        return self.run(identity)["state"]

    def start(self) -> str:
        """What `make serve` prints."""
        done = command(self.root, "flows.serve", "--port", str(self.port))
        assert done.returncode == 0, done.stderr
        return done.stdout

    def kill(self, name: str) -> None:
        """Kill -9 of the server, or of the worker with its runs and their stages."""
        process = psutil.Process(server.running(self.root)[name].pid)
        for one in [process, *process.children(recursive=True)]:
            one.kill()

    def pool(self, name: str) -> dict[str, object]:
        return self._api.get(f"/work_pools/{name}").raise_for_status().json()

    def waiting(self, deployment: str) -> int:
        """Runs of a schedule that are due and have not started."""
        now = datetime.now(UTC).isoformat()
        due = {"expected_start_time": {"before_": now}, "state": {"type": {"any_": ["SCHEDULED"]}}}
        found = self.post("/flow_runs/filter", deployments={"name": {"any_": [deployment]}}, flow_runs=due)
        return len([run for run in found if run["auto_scheduled"]])

    def at_work(self, deployment: str) -> int:
        """Runs that a worker has taken and that have not ended; the state of one that starts has several names."""
        taken = {"state": {"type": {"any_": ["PENDING", "RUNNING"]}}}
        return len(self.post("/flow_runs/filter", deployments={"name": {"any_": [deployment]}}, flow_runs=taken))

    def states(self, deployment: str) -> list[str]:
        found = self.post("/flow_runs/filter", deployments={"name": {"any_": [deployment]}})
        return sorted(run["state_name"] for run in found)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path, migrated_prefect: Path) -> Iterator[Toy]:
    outside = tmp_path_factory.mktemp("survival")
    root = tiny.tree(outside / "tree")
    (root / "dvc.yaml").write_text(TOY.format(outside=outside))
    (root / "toy.py").write_text(STAGES)
    remote = ["remote", "add", "--quiet", "--default", "storage", str(outside / "remote")]
    subprocess.run(dvc.command(*remote), cwd=root, check=True)
    tiny.git(root, "add", ".")
    tiny.git(root, "commit", "--quiet", "-m", "a toy chain")
    tiny.git(outside, "clone", "--quiet", "--bare", str(root), "origin.git")
    shutil.copy(migrated_database, root / "mlflow.db")
    (root / ".prefect" / "home").mkdir(parents=True)
    shutil.copy(migrated_prefect, root / ".prefect" / "home")
    (outside / "source.txt").write_text("first")
    (outside / "go").touch()
    port = free_port()
    try:
        with httpx.Client(base_url=f"{server.url(port)}/api", timeout=120) as api:
            served = Toy(root, port, api, "")
            served.start()
            for name in ("nightly", "champion-check", "data-refresh", "watch"):  # their hour may come
                served.pause(name)
            yield served
    finally:
        assert command(root, "flows.stop").returncode == 0


def test_an_event_of_the_source_refreshes_the_data_and_starts_the_chain(toy: Toy) -> None:
    """By the command that the documentation gives for announcing new data."""
    found = re.search(r"^PREFECT_API_URL=\S+ prefect event emit .*$", OPERATIONS.read_text(), re.M)
    assert found
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    kept |= {"HOME": str(toy.outside), "PATH": server.search_path()}
    announced = ["bash", "-ec", found[0].replace("http://127.0.0.1:4200", server.url(toy.port))]
    subprocess.run(announced, env=kept, check=True, timeout=START)
    toy.wait(lambda: toy.states("data-refresh") == ["Completed"], START, "the end of the refresh")
    toy.wait(lambda: toy.states("on-demand") == ["Completed"], START, "the end of the chain")
    run = toy.runs("data-refresh")[0]
    assert "which has no version; started afterimage/on-demand" in run["state"]["message"]
    assert toy.runs("on-demand")[0]["state"]["message"].startswith("ran slow, last; 3 of 5 stages cached")


def test_a_long_stage_survives_a_server_that_is_away_for_longer_than_the_silence_limit(toy: Toy) -> None:
    toy.source("second")
    (toy.outside / "go").unlink()
    before = toy.begun()
    identity = toy.trigger("on-demand")
    toy.wait(lambda: toy.begun() > before, START, "the start of the stage")
    time.sleep(2 * server.HEARTBEAT_SECONDS)  # the server knows a heartbeat, and expects the next
    toy.kill(server.SERVER)
    time.sleep(server.SILENCE_SECONDS + 20)
    toy.start()
    time.sleep(server.SILENCE_SECONDS)
    crashed = {"type": "CRASHED", "message": f"{server.SILENT} 90 s"}  # what a server does that was away for less long
    toy.post(f"/flow_runs/{identity}/set_state", state=crashed, force=True)
    toy.wait(lambda: toy.run(identity)["state_type"] == "RUNNING", 120, "the correction of the state")
    (toy.outside / "go").touch()
    state = toy.ended(identity)
    assert state["type"] == "COMPLETED", state
    assert state["message"].startswith("ran download, ingest, validate, slow, last")
    assert toy.begun() == before + 1, "the stage was not started again"


def test_a_run_whose_worker_was_killed_is_crashed_without_a_worker(toy: Toy) -> None:
    toy.source("third")
    (toy.outside / "go").unlink()
    before = toy.begun()
    identity = toy.trigger("on-demand")
    toy.wait(lambda: toy.begun() > before, START, "the start of the stage")
    time.sleep(2 * server.HEARTBEAT_SECONDS)
    toy.kill(server.WORKER)
    state = toy.ended(identity, 3 * server.SILENCE_SECONDS)
    assert state["type"] == "CRASHED" and state["message"] == f"{server.SILENT} {server.SILENCE_SECONDS} s"
    (toy.outside / "go").touch()
    toy.start()
    again = toy.ended(toy.trigger("on-demand"))
    assert again["type"] == "COMPLETED", again


def test_a_deleted_flow_file_does_not_end_the_worker(toy: Toy) -> None:
    file = toy.root / "flows" / "gone.py"
    file.write_text("from prefect import flow\n\n@flow\ndef gone() -> None: ...\n")
    deploy = ["prefect", "--no-prompt", "deploy", "flows/gone.py:gone", "--name", "gone", "--pool", server.POOL]
    variables = server.environment(toy.root, toy.port)
    subprocess.run([sys.executable, "-m", *deploy], cwd=toy.root, env=variables, check=True, timeout=START)
    worker = server.running(toy.root)[server.WORKER]
    assert toy.ended(toy.trigger("gone"))["type"] == "COMPLETED"
    file.unlink()
    assert toy.ended(toy.trigger("gone"))["type"] == "CRASHED"
    time.sleep(5)
    assert server.alive(worker)
    assert toy.ended(toy.trigger("on-demand"))["type"] == "COMPLETED", "the worker takes the next run"


def test_missed_runs_do_not_pile_up(toy: Toy) -> None:
    """Of the runs of five hours without a worker, one starts."""
    server.stop(toy.root, server.running(toy.root)[server.WORKER])
    toy.resume("watch")
    before = len(toy.states("watch"))
    start, end = ((datetime.now(UTC) - timedelta(hours=hours)).isoformat() for hours in (5, 0))
    plan = {"start_time": start, "end_time": end, "min_runs": 5, "max_runs": 5}
    toy.post(f"/deployments/{toy.deployment('watch')['id']}/schedule", **plan)
    assert toy.waiting("watch") == 5
    said = toy.start()
    assert "serve: 4 missed run(s) of deployment 'watch' are skipped; the newest starts" in said
    toy.wait(lambda: toy.waiting("watch") == 0, START, "the start of the newest")
    toy.wait(lambda: toy.at_work("watch") == 0, START, "its end")
    assert len([run for run in toy.runs("watch") if run["auto_scheduled"]]) == 1, before


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_the_server_accepts_deployments_on_a_pool_with_our_job_template(toy: Toy, kind: str) -> None:
    pool, repository = f"afterimage-{kind}", "https://git.example.org/afterimage.git"
    unknown = command(toy.root, "flows.deploy", pool, "--repository", repository)
    assert unknown.stderr == f"deploy: error: there is no work pool {pool}; name its --type, which creates it\n"
    done = command(toy.root, "flows.deploy", pool, "--type", kind, "--limit", "2", "--repository", repository)
    assert done.returncode == 0, done.stderr
    found = toy.pool(pool)
    assert (found["type"], found["concurrency_limit"]) == (kind, 2)
    assert "gpu" in str(found["base_job_template"])
    nightly = toy.deployment(f"nightly-{kind}")
    assert nightly["work_pool_name"] == pool and "git_clone" in str(nightly["pull_steps"])
    assert toy.deployment(f"data-refresh-{kind}")["parameters"] == {"pipeline": f"afterimage/on-demand-{kind}"}


def test_a_worker_on_another_machine_fetches_code_and_data_and_pushes_its_results(toy: Toy, tmp_path: Path) -> None:
    """Another machine: another folder, another home, and only the addresses of Git, the DVC remote and the server."""
    arguments = ["elsewhere", "--type", "process", "--repository", f"file://{toy.outside / 'origin.git'}"]
    done = command(toy.root, "flows.deploy", *arguments)
    assert done.returncode == 0, done.stderr
    assert "deploy: nightly-elsewhere, on-demand-elsewhere, sweep-elsewhere" in done.stdout
    server.stop(toy.root, server.running(toy.root)[server.WORKER])
    for name in ("nightly-elsewhere", "champion-check-elsewhere", "data-refresh-elsewhere"):
        toy.pause(name)
    (tmp_path / "home").mkdir()
    shutil.copy(toy.root / "mlflow.db", tmp_path / "mlflow.db")
    variables = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "PREFECT_API_URL": f"{server.url(toy.port)}/api",
        "PREFECT_WORKER_QUERY_SECONDS": "3",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
    }
    pushed = {path for path in (toy.outside / "remote").rglob("*") if path.is_file()}
    command_line = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "elsewhere"]
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(command_line, cwd=tmp_path, env=variables, stdout=log, stderr=subprocess.STDOUT)
    try:
        state = toy.ended(toy.trigger("on-demand-elsewhere"), 2 * START)
        assert state["type"] == "COMPLETED", (state, (tmp_path / "worker.log").read_text()[-3000:])
        assert state["message"] == "ran nothing; 5 of 5 stages cached", "all of it came from the remote"
        toy.source("from elsewhere")
        state = toy.ended(toy.trigger("on-demand-elsewhere"), 2 * START)
        assert state["type"] == "COMPLETED", state
        assert "ran nothing" not in state["message"]
        assert {path for path in (toy.outside / "remote").rglob("*") if path.is_file()} > pushed
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait(60)
