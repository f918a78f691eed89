"""A signal to a flow that runs two stages at the same time: both end, and the next run gives the same files."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.support import tiny
from tests.support.stage_drill import environment, hashes

if TYPE_CHECKING:
    from tests.flows.conftest import Chain

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]  # two chains, and servers of Prefect
BESIDE = {"tasks.judge", "tasks.train"}
OVERRIDES = ("train.seed=7", "train.steps=200", "judge.seed=7", "judge.classifier_steps=1500")
"""Of a chain in which the judge is trained beside the model, both for seconds."""
START_SECONDS = 600.0
END_SECONDS = 60.0


def tree_of(folder: Path, chain: Chain, database: Path) -> Path:
    """A work tree whose DVC cache has all results but those of `judge`, `train` and what follows."""
    tree = tiny.tree(folder, *OVERRIDES)
    shutil.copytree(chain.cache, tree / ".dvc" / "cache", dirs_exist_ok=True)
    shutil.copy(database, tree / "mlflow.db")
    return tree


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, chain: Chain, migrated_database: Path) -> dict[str, str]:
    """What the chain writes with one stage after the other and without a signal: path -> hash."""
    tree = tree_of(tmp_path_factory.mktemp("undisturbed") / "tree", chain, migrated_database)
    tiny.run(tree, "infra.run")
    return hashes(tree)


def start(tree: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start the flow with two jobs, as from a terminal: a process in the background ignores Ctrl-C."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.pipeline", "--jobs", "2"],
            cwd=tree,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - it only sets a signal
        )


def stages_of(processes: list[psutil.Process]) -> set[str]:
    """Modules of the stages among the processes."""
    found = set()
    for process in processes:
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        found |= BESIDE & set(words) if words[1:2] == ["-m"] else set()
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_both_stages_end_and_the_next_run_gives_the_same(
    tmp_path: Path, chain: Chain, migrated_database: Path, undisturbed: dict[str, str], number: signal.Signals
) -> None:
    tree, log = tree_of(tmp_path / "tree", chain, migrated_database), tmp_path / "log"
    flow = start(tree, log)
    below: list[psutil.Process] = []
    deadline = time.monotonic() + START_SECONDS
    while stages_of(below) != BESIDE:
        assert flow.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)
        below = psutil.Process(flow.pid).children(recursive=True)
    time.sleep(3)  # both import their packages, or train
    flow.send_signal(number)
    code = flow.wait(END_SECONDS)
    assert code != 0
    assert psutil.wait_procs(below, timeout=10)[1] == []
    assert "the same command continues" in log.read_text(), log.read_text()[-3000:]

    again = start(tree, log)
    assert again.wait(START_SECONDS) == 0, log.read_text()[-3000:]
    assert hashes(tree) == undisturbed
