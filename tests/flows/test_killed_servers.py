"""kill -9 of each process of the stack at random moments of a running chain, then restart and finish.

PostgreSQL, the S3 server, MLflow's and Prefect's server, and the worker. Each round trains something else, so that
there must be one more run and one more version afterwards: none lost, none twice. `AFTERIMAGE_DRILL_SERVER_ROUNDS` sets
the rounds for each process.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from flows import server
from infra import stack_database, stack_storage
from tests.flows.test_prefect_server import FINAL, Served
from tests.infra.test_local_stack import command, free_port, free_ports
from tests.support import postgres, tiny
from tests.support.stage_drill import environment, hashes

if TYPE_CHECKING:
    from tests.flows.conftest import Chain

pytestmark = pytest.mark.slow  # a stack of its own, and many chains
ROUNDS = int(os.environ.get("AFTERIMAGE_DRILL_SERVER_ROUNDS") or 1)
SEED = int(os.environ.get("AFTERIMAGE_DRILL_SEED") or 0)
LONGEST_WAIT = 40.0
"""Seconds of a run until the kill, at most."""
REMOTE = "s3://dvc/drill"
ADDRESS = re.compile(r"(?:stack: MLflow|export MLFLOW_TRACKING_URI=) ?(http\S+)")


class Stack:
    """A tiny work tree whose stack runs, and may be killed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ports = {"--port": free_port(), "--mlflow-port": free_port(), "--storage-port": free_ports()}
        self.mlflow = ""

    def start(self) -> None:
        """Start what does not run."""
        done = command(self.root, *(str(word) for pair in self.ports.items() for word in pair))
        assert done.returncode == 0, done.stderr + self.logs()
        found = ADDRESS.search(done.stdout)
        assert found, done.stdout
        self.mlflow = found[1]

    def logs(self) -> str:
        """The end of what each process wrote; the folder is deleted at the end."""
        files = sorted((self.root / server.LOGS).glob("*.log"))
        return "\n".join(f"{file.name}:\n{file.read_text(errors='replace')[-2000:]}" for file in files)

    def kill(self, name: str) -> None:
        """Kill -9 of a process with all of its group."""
        process = server.running(self.root)[name]
        os.killpg(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while server.alive(process):
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def variables(self) -> dict[str, str]:
        """The variables that a person sources to use the stack."""
        text = (self.root / server.STACK / "env").read_text(encoding="utf-8")
        return dict(re.findall(r"^export (\w+)='?(.*?)'?$", text, re.M))


@pytest.fixture
def stack(chain: Chain) -> Iterator[Stack]:
    found = (stack_database._programs(None), shutil.which(stack_storage.PROGRAM, path=server.search_path()))
    if None in found or importlib.util.find_spec("psycopg2") is None:
        pytest.skip("needs PostgreSQL and the extra stack")
    with postgres.open_folder() as folder:
        root = tiny.tree(folder / "tree")
        shutil.copytree(chain.cache, root / ".dvc" / "cache", dirs_exist_ok=True)
        dvc(root, "remote", "add", "--default", "storage", REMOTE)
        tiny.git(root, "commit", "--quiet", "--all", "-m", "a remote")
        running = Stack(root)
        try:
            running.start()
            assert set(server.running(root)) == {"postgres", "storage", "mlflow", "server", "worker"}
            yield running
        finally:
            assert command(root, "--down").returncode == 0


def dvc(tree: Path, *arguments: str, **more: str) -> None:
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=tree, env=environment() | more, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(3600 + ROUNDS * 3600)
def test_no_run_is_lost_and_no_version_is_registered_twice(stack: Stack, tmp_path, monkeypatch, capsys):
    outcomes: Counter[str] = Counter()
    moments = random.Random(SEED)
    victims = [name for _ in range(ROUNDS) for name in server.running(stack.root)]
    overrides: list[str] = []
    with httpx.Client(base_url=f"{server.url(stack.ports['--port'])}/api", timeout=120) as api:
        served = Served(stack.root, stack.ports["--port"], api, "")
        for index, victim in enumerate(victims):
            overrides = [*tiny.OVERRIDES, f"train.seed={100 + index}"]
            identity = served.trigger("on-demand", preset="digits", overrides=overrides)
            served.wait(lambda i=identity: served.run(i)["state_type"] in {"RUNNING", *FINAL}, 300, "the start")
            wait = moments.uniform(0, LONGEST_WAIT)
            time.sleep(wait)
            stack.kill(victim)
            time.sleep(moments.uniform(0, 5))
            stack.start()
            served.wait(lambda i=identity: served.run(i)["state_type"] in FINAL, 1800, "the end")
            run = served.run(identity)
            outcomes[f"{victim}: {run['state_type'].lower()}"] += 1
            with capsys.disabled():
                message = (run["state"]["message"] or "").partition("\n")[0]
                print(f"\n{victim} killed after {wait:.0f} s: {run['state_type'].lower()}: {message[:150]}", flush=True)
            if run["state_type"] != "COMPLETED":
                _finish(served, overrides)
    with capsys.disabled():
        print(f"outcomes of {len(victims)} kills: {dict(outcomes)}")
    _require_one_of_each(stack.mlflow, len(victims), monkeypatch)
    finished = stack.root / ".prefect" / "workspaces" / "on-demand"
    pulled = _pulled(finished, tmp_path / "pulled", stack.variables())
    undisturbed = tiny.tree(tmp_path / "undisturbed", overrides[-1])
    tiny.run(undisturbed, "infra.run")
    assert hashes(finished) == hashes(pulled) == hashes(undisturbed)


def _finish(served: Served, overrides: list[str]) -> None:
    """Run the same again, as the next scheduled run would."""
    identity = served.trigger("on-demand", preset="digits", overrides=overrides)
    served.wait(lambda: served.run(identity)["state_type"] in FINAL, 1800, "the end of the second run")
    run = served.run(identity)
    assert run["state_type"] == "COMPLETED", run["state"]["message"]


def _require_one_of_each(address: str, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.register import CONTENT_KEY
    from tasks.runtime import tracking

    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    client = tracking.connect()
    runs = client.search_runs([tracking.experiment_id(client)], f"tags.`{tracking.KIND}` = 'training'")
    assert len({run.data.tags[tracking.TRAIN_KEY] for run in runs}) == len(runs) == rounds
    assert {run.info.status for run in runs} == {"FINISHED"}
    versions = client.search_model_versions("name = 'afterimage-digits'")
    assert len({version.tags[CONTENT_KEY] for version in versions}) == len(versions) == rounds


def _pulled(finished: Path, folder: Path, variables: dict[str, str]) -> Path:
    """Restore everything from the remote, with an empty cache; DVC computes the hashes of what it gets."""
    tree = tiny.tree(folder)
    dvc(tree, "remote", "add", "--default", "storage", REMOTE)
    for name in ("dvc.lock", "params.yaml"):
        shutil.copy(finished / name, tree)
    dvc(tree, "pull", **variables)
    dvc(tree, "data", "status", "--quiet")
    return tree
