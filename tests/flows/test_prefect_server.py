"""A real Prefect server and worker of `make serve`: a schedule, a cancelled run, a killed run.

The work tree has the DVC cache of the shared chain, so that its runs compute only what differs. The tests build on each
other, in their order.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

from flows import server
from infra import browser
from tasks.params import composition
from tests.support import tiny

if TYPE_CHECKING:
    from tests.flows.conftest import Chain

FINAL = {"COMPLETED", "FAILED", "CANCELLED", "CRASHED"}


class Served:
    """A tiny work tree whose Prefect server runs."""

    def __init__(self, root: Path, port: int, api: httpx.Client, said: str) -> None:
        self.root = root
        self.port = port
        self.said = said
        """What `make serve` printed."""
        self.status = tiny.git(root, "status", "--porcelain")
        """What Git reported before the first run."""
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

    def trigger(self, deployment: str, in_hours: int = 0, **parameters: Any) -> str:
        when = (datetime.now(UTC) + timedelta(hours=in_hours)).isoformat()
        state = {"type": "SCHEDULED", "state_details": {"scheduled_time": when}}
        path = f"/deployments/{self.deployment(deployment)['id']}/create_flow_run"
        return self.post(path, state=state, parameters=parameters)["id"]

    def pending(self, deployment: str) -> str:
        """A run that a worker has just taken: it holds a slot, and has no process yet."""
        identity = self.trigger(deployment, in_hours=24)
        answer = self.post(f"/flow_runs/{identity}/set_state", state={"type": "PENDING"})
        assert answer["status"] == "ACCEPT", answer
        return identity

    def slots(self, deployment: str) -> int:
        return self.deployment(deployment)["global_concurrency_limit"]["active_slots"]

    def slots_in_database(self) -> int:
        with sqlite3.connect(self.root / ".prefect" / "home" / "prefect.db") as store:
            return store.execute("select sum(active_slots) from concurrency_limit_v2").fetchone()[0]

    def pause(self, deployment: str) -> None:
        self.post(f"/deployments/{self.deployment(deployment)['id']}/pause_deployment")

    def resume(self, deployment: str) -> None:
        self.post(f"/deployments/{self.deployment(deployment)['id']}/resume_deployment")

    def deployment(self, name: str) -> dict[str, Any]:
        return self.post("/deployments/filter", deployments={"name": {"any_": [name]}})[0]

    def artifacts(self, run: str) -> dict[str, Any]:
        """What a run published: key -> data."""
        return {entry["key"]: entry["data"] for entry in self.post("/artifacts/filter") if entry["flow_run_id"] == run}

    def artifacts_of_key(self, key: str) -> str:
        return next(str(entry["data"]) for entry in self.post("/artifacts/filter") if entry["key"] == key)

    def python(self, code: str) -> str:
        """Output of Python code that runs as a process of this server's, with its settings."""
        code = f"from prefect.client.orchestration import get_client; {code}"
        environment = server.environment(self.root, self.port)
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

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
        [sys.executable, "-m", module, *arguments], cwd=root, env=kept, capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, chain: Chain, migrated_database: Path, migrated_prefect: Path
) -> Iterator[Served]:
    # Another time limit makes `download` run, which gives the same files; so what follows is in the cache.
    root = tiny.tree(tmp_path_factory.mktemp("served"), "download.timeout_seconds=1800")
    shutil.copytree(chain.cache, root / ".dvc" / "cache", dirs_exist_ok=True)
    shutil.copy(migrated_database, root / "mlflow.db")
    (root / ".prefect" / "home").mkdir(parents=True)
    shutil.copy(migrated_prefect, root / ".prefect" / "home")
    schedule = root / "prefect.yaml"
    often = r"    paused: true\n\1- interval: 10\n"  # the test that needs a scheduled run resumes it
    text, count = re.subn(r"(    schedules:\n\s+)- cron: \"0 2 .*\n\s+timezone: .*\n", often, schedule.read_text())
    half_an_hour_away = f"{(datetime.now(UTC).minute + 30) % 60} * * * *"
    text, other = re.subn(r"30 \* \* \* \*", half_an_hour_away, text)
    assert count == other == 1
    schedule.write_text(text)
    port = free_port()
    try:
        done = command(root, "flows.serve", "--port", str(port))
        assert done.returncode == 0, done.stderr
        assert f"http://127.0.0.1:{port}" in done.stdout
        with httpx.Client(base_url=f"{server.url(port)}/api", timeout=60) as api:
            yield Served(root, port, api, done.stdout)
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


@pytest.fixture(scope="module")
def scheduled(served: Served) -> dict[str, Any]:
    """A run that the schedule started, after its end."""
    served.resume("nightly")
    first = served.wait(lambda: next(iter(served.runs("nightly")), None), 90, "the start of a scheduled run")
    served.pause("nightly")  # one is enough
    served.wait(lambda: served.run(first["id"])["state_type"] in FINAL, 420, "the end of the scheduled run")
    return served.run(first["id"])


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_scheduled_run_finishes_by_itself_and_its_metrics_are_in_mlflow(served: Served, scheduled: dict) -> None:
    run = scheduled
    assert run["auto_scheduled"] is True
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    assert re.fullmatch(r"digits \d{4}-\d\d-\d\d \d\d:\d\d", run["name"])
    refused = (
        r"afterimage-digits version 1 refused, there is no champion: frechet_distance .*; ran download, register; .*"
    )
    assert re.fullmatch(refused, run["state"]["message"])

    with sqlite3.connect(served.root / "mlflow.db") as store:
        metrics = {row[0] for row in store.execute("select key from latest_metrics")}
        lineage = {row[0]: row[1] for row in store.execute("select key, value from model_version_tags")}
        versions = store.execute("select count(*) from model_versions").fetchone()[0]
    assert {"train/loss", "eval/frechet_distance_unguided", "eval/label_accuracy_guided"} <= metrics
    assert lineage["afterimage.prefect_flow_run"] == run["id"]
    assert lineage["afterimage.git_dirty"] == "false"
    assert versions == 1
    assert tiny.git(served.root, "status", "--porcelain") == served.status, "a schedule writes no file of a person"
    assert not (served.root / "outputs").exists()
    kept = {path.name for path in (served.root / "mlruns").rglob(f"flows/{run['id']}/*")}
    assert kept == {"dvc.lock", "params.yaml"}, "the next run in the clone overwrites them"

    artifacts = served.artifacts(run["id"])
    assert {"stages", "metrics", "samples", "links", "promotion"} <= set(artifacts)
    assert "was refused" in artifacts["promotion"] and "frechet_distance" in artifacts["promotion"]


@pytest.mark.slow
@pytest.mark.skipif(browser.find() is None, reason="no Chromium here")
def test_the_sample_grid_fits_its_page(served: Served, scheduled: dict) -> None:
    of_run = {"flow_run_id": {"any_": [scheduled["id"]]}}
    grid = next(entry for entry in served.post("/artifacts/filter", artifacts=of_run) if entry["key"] == "samples")
    with browser.browse(browser.find() or "") as page:
        page.size(1280, 900)
        page.visit(f"{server.url(served.port)}/artifacts/artifact/{grid['id']}", timeout=60)
        page.settle()
        assert page.evaluate("document.images.length && document.images[0].naturalWidth") > 100
        # The page cuts off what is too wide, so nothing scrolls: ask the elements themselves.
        wide = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > 1280)"
        assert page.evaluate(f"{wide}.map(e => e.tagName)") == []


def test_the_form_of_a_run_lists_the_presets_and_explains_the_parameters(served: Served) -> None:
    properties = served.deployment("on-demand")["parameter_openapi_schema"]["properties"]
    assert properties["preset"]["enum"] == ["params.yaml", *composition.names()]
    assert all(values["description"] for values in properties.values())


def test_a_failed_run_says_why(served: Served) -> None:
    changes = [*tiny.OVERRIDES, "validate.min_images=100000"]
    identity = served.trigger("on-demand", preset="digits", overrides=changes)
    served.wait(lambda: served.run(identity)["state_type"] in FINAL, 240, "the end of the run that must fail")
    run = served.run(identity)
    assert run["state_type"] == "FAILED"
    assert run["state"]["message"].startswith("validate: error: the data is not accepted: ")
    artifacts = served.artifacts(identity)
    stages = {row["stage"]: row["result"] for row in json.loads(artifacts["stages"])}
    assert stages["ingest"] == "Cached" and stages["validate"] == "Failed" and stages["train"] == "not reached"
    assert ".prefect/workspaces/on-demand/reports/validation/index.html" in artifacts["failure"]

    def logged() -> bool:
        lines = served.post("/logs/filter", logs={"flow_run_id": {"any_": [identity]}, "level": {"ge_": 40}})
        return any(line["message"].startswith("validate: error: ") for line in lines)

    # Prefect sends the lines of a run in batches, some of them after its final state.
    served.wait(logged, 30, "the line of the failed stage in the run's log")


@pytest.mark.slow
def test_the_commands_that_serve_prints_start_a_run(served: Served, tmp_path: Path) -> None:
    """In a shell that knows nothing, in any folder; an hour from now, as the preset itself takes minutes."""
    export, run = re.findall(r"^  (\S.*)$", served.said, re.M)
    script = f"{export}\n{run} --start-in '1 hour'"
    clean = {"PATH": os.defpath, "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    identity = re.search(r"UUID: (\S+)", done.stdout)
    assert identity and served.run(identity[1])["parameters"] == {"preset": "digits"}


@pytest.mark.slow
def test_make_run_needs_a_server_and_a_preset(served: Served, tmp_path: Path) -> None:
    unknown = command(served.root, "flows.on_demand", "digit")
    assert unknown.returncode and "'digits'" in unknown.stderr
    environment = {**os.environ, "PYTHONPATH": str(tiny.ROOT)}
    run = [sys.executable, "-m", "flows.on_demand", "digits"]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "run: error: no Prefect server of this work tree runs; start it: make serve\n"
    started = command(served.root, "flows.on_demand", "digits", "train.stepz=1")
    identity = re.search(r"UUID: (\S+)", started.stdout)
    assert identity, started.stderr
    served.wait(lambda: served.run(identity[1])["state_type"] in FINAL, 90, "the end of the run with a typing error")
    assert "train.stepz" in served.run(identity[1])["state"]["message"]


REPAIR = (
    "from datetime import datetime, UTC; from flows import slots\n"
    "with get_client(sync_client=True) as client: print(*slots.repair(client, datetime.now(UTC)), sep='\\n')"
)


def test_a_slot_whose_run_has_no_process_is_freed(served: Served) -> None:
    identity = served.pending("nightly")
    assert served.slots("nightly") == 1
    sleeper = subprocess.Popen(["sleep", "600"], env={**os.environ, "PREFECT__FLOW_RUN_ID": identity})
    try:
        assert served.python(REPAIR).strip() == "", "the run has a process"
        assert served.slots("nightly") == 1
    finally:
        sleeper.kill()
        sleeper.wait()
    assert "was Pending without a process and is crashed now" in served.python(REPAIR)
    assert served.run(identity)["state_type"] == "CRASHED"
    assert served.slots("nightly") == 0


def test_a_slot_that_no_run_holds_is_freed(served: Served) -> None:
    limit = served.deployment("nightly")["global_concurrency_limit"]["name"]
    served.post("/v2/concurrency_limits/increment", names=[limit], slots=1, mode="concurrency")
    assert served.slots("nightly") == 1
    assert "1 slot(s) of deployment 'nightly' were held by no run and are free now" in served.python(REPAIR)
    assert served.slots("nightly") == 0


@pytest.mark.slow
def test_a_schedule_that_does_not_start_is_reported(served: Served) -> None:
    """By the scheduled check, and by `make serve`, which also starts the worker that was missing."""
    server.stop(served.root, server.running(served.root)["worker"])
    deployment = served.deployment("watch")["id"]
    start, end = ((datetime.now(UTC) - timedelta(minutes=minutes)).isoformat() for minutes in (60, 11))
    served.post(f"/deployments/{deployment}/schedule", start_time=start, end_time=end)
    check = "from flows.watch import watch; state = watch(return_state=True); print(state.type.value, state.message)"
    late = r"the run of 'watch' due at \d{4}-.* UTC has not started"
    assert re.search(rf"FAILED {late}", served.python(check))
    assert re.search(late, served.artifacts_of_key("watch"))
    done = command(served.root, "flows.serve")
    assert done.returncode == 0, done.stderr
    assert re.search(rf"serve: warning: {late}", done.stderr)
    assert served.deployment("nightly")["paused"], "somebody paused it"


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
@pytest.mark.slow
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


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_cancelling_ends_two_stages_that_run_at_the_same_time(served: Served) -> None:
    changes = [*tiny.OVERRIDES, "train.steps=1000000", "judge.classifier_steps=1000000"]
    identity = served.trigger("on-demand", preset="digits", overrides=changes, jobs=2)
    folder = served.root / ".prefect" / "workspaces" / "on-demand"
    both = [
        served.wait(lambda module=module: stage_of(folder, module), 150, f"the start of {module}")
        for module in ("tasks.judge", "tasks.train")
    ]
    served.post(f"/flow_runs/{identity}/set_state", state={"type": "CANCELLING"}, force=True)
    served.wait(lambda: not any(stage.is_running() for stage in both), 40, "the end of both cancelled stages")
    served.wait(lambda: served.run(identity)["state_type"] == "CANCELLED", 60, "the state Cancelled")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_that_was_pending_when_the_server_was_killed_does_not_stop_the_schedule(served: Served) -> None:
    pending = served.pending("nightly")
    psutil.Process(server.running(served.root)["server"].pid).kill()
    assert served.slots_in_database() == 1
    done = command(served.root, "flows.serve", "--port", str(served.port))
    assert done.returncode == 0, done.stderr
    assert "was Pending without a process" in done.stdout
    assert served.run(pending)["state_type"] == "CRASHED"
    before = {run["id"] for run in served.runs("nightly")}
    served.resume("nightly")
    served.wait(lambda: {run["id"] for run in served.runs("nightly")} - before, 90, "the next scheduled run")
    served.pause("nightly")


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_run_can_be_cancelled_after_its_server_was_away(served: Served) -> None:
    """After 40 s without the server Prefect's worker stops to listen for cancellations."""
    identity, training = start_training(served)
    log = served.root / server.LOGS / "worker.log"
    given_up = log.read_text(errors="replace").count("polling task failed")
    psutil.Process(server.running(served.root)["server"].pid).kill()
    gives_up = lambda: log.read_text(errors="replace").count("polling task failed") > given_up  # noqa: E731
    served.wait(gives_up, 150, "the worker giving up")
    done = command(served.root, "flows.serve", "--port", str(served.port))
    assert done.returncode == 0, done.stderr
    assert training.is_running()
    served.post(f"/flow_runs/{identity}/set_state", state={"type": "CANCELLING"}, force=True)
    served.wait(lambda: not training.is_running(), 120, "the end of the cancelled training")
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
