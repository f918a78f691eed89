"""kill -9 of the MLflow server and of the Prefect server at random moments of a running chain, then restart and finish.

Each round trains something else, so that there must be one more run and one more version afterwards: none lost, none
twice. `AFTERIMAGE_DRILL_ROUNDS` sets the rounds for each server.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from flows import server
from tests.flows.test_prefect_server import FINAL, Served
from tests.infra.test_local_stack import command, free_port, free_ports
from tests.support import tiny

if TYPE_CHECKING:
    from tests.flows.conftest import Chain

pytestmark = pytest.mark.slow  # a stack of its own, and many chains
ROUNDS = int(os.environ.get("AFTERIMAGE_DRILL_ROUNDS", "2"))
LONGEST_WAIT = 25.0
"""Seconds of a run until the kill, at most."""


class Stack:
    """A tiny work tree whose stack runs, and may be killed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ports = {name: str(free_port()) for name in ("--port", "--mlflow-port")}
        self.ports["--storage-port"] = str(free_ports())
        self.mlflow = ""

    def start(self) -> None:
        done = command(self.root, *(word for pair in self.ports.items() for word in pair))
        assert done.returncode == 0, done.stderr
        found = re.search(r"stack: MLflow (\S+)", done.stdout)
        assert found
        self.mlflow = found[1]

    def kill(self, name: str) -> None:
        """Kill -9 of a server with all its processes."""
        process = server.running(self.root)[name]
        os.killpg(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while server.alive(process):
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.fixture
def stack(tmp_path, chain: Chain) -> Iterator[Stack]:
    root = tiny.tree(tmp_path / "tree")
    shutil.copytree(chain.cache, root / ".dvc" / "cache", dirs_exist_ok=True)
    running = Stack(root)
    try:
        running.start()
        yield running
    finally:
        assert command(root, "--down").returncode == 0


@pytest.mark.timeout(3600)
def test_no_run_is_lost_and_no_version_is_registered_twice(stack: Stack, monkeypatch):
    outcomes: Counter[str] = Counter()
    moments = random.Random(15)
    rounds = [(victim, number) for number in range(ROUNDS) for victim in ("mlflow", "server")]
    with httpx.Client(base_url=f"{server.url(int(stack.ports['--port']))}/api", timeout=120) as api:
        served = Served(stack.root, int(stack.ports["--port"]), api, "")
        for index, (victim, _) in enumerate(rounds):
            overrides = [*tiny.OVERRIDES, f"train.seed={100 + index}"]
            identity = served.trigger("on-demand", preset="digits", overrides=overrides)
            served.wait(lambda i=identity: served.run(i)["state_type"] in {"RUNNING", *FINAL}, 120, "the start")
            time.sleep(moments.uniform(0, LONGEST_WAIT))
            stack.kill(victim)
            time.sleep(moments.uniform(0, 5))
            stack.start()
            served.wait(lambda i=identity: served.run(i)["state_type"] in FINAL, 600, "the end")
            state = served.run(identity)["state_type"]
            outcomes[f"{victim} killed: {state.lower()}"] += 1
            if state != "COMPLETED":
                _finish(served, overrides)
    print(f"outcomes of {len(rounds)} kills: {dict(outcomes)}")
    _require_one_of_each(stack.mlflow, len(rounds), monkeypatch)


def _finish(served: Served, overrides: list[str]) -> None:
    """Run the same again, as the next scheduled run would."""
    identity = served.trigger("on-demand", preset="digits", overrides=overrides)
    served.wait(lambda: served.run(identity)["state_type"] in FINAL, 600, "the end of the second run")
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
