"""Independent stages at the same time: the order, failures, stages that run alone, and DVC's lock file."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flows import cancelling, dvc, repro, schedule
from tasks.runtime import leash
from tasks.runtime.errors import StageError
from tests.support import tiny

DIAMOND = {"first": [], "left": ["first"], "right": ["first"], "below": ["left"], "last": ["below", "right"]}


class Works:
    """A stand-in for stages: notes what runs beside what."""

    def __init__(self, *bad: str, seconds: float = 0.03) -> None:
        self.bad = bad
        self.seconds = seconds
        self.ended: list[str] = []
        self.beside: dict[str, set[str]] = {}
        self.threads: dict[str, threading.Thread] = {}
        self._running: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, stage: str) -> bool:
        with self._lock:
            self._running.add(stage)
            self.threads[stage] = threading.current_thread()
            for one in self._running:
                self.beside.setdefault(one, set()).update(self._running - {one})
        time.sleep(self.seconds * (3 if stage == "right" else 1))
        with self._lock:
            self._running.remove(stage)
            self.ended.append(stage)
        return stage not in self.bad


def test_independent_stages_run_at_the_same_time_after_all_they_depend_on() -> None:
    works = Works()
    schedule.run(DIAMOND, works, jobs=2)
    assert sorted(works.ended) == sorted(DIAMOND)
    for stage, upstream in DIAMOND.items():
        assert all(works.ended.index(one) < works.ended.index(stage) for one in upstream)
    assert works.beside["right"] == {"left", "below"}
    assert works.beside["first"] == works.beside["last"] == set()
    main = threading.main_thread()
    assert {stage for stage, thread in works.threads.items() if thread is main} == {"first", "last"}


def test_with_one_job_stages_run_in_their_order_in_the_calling_thread() -> None:
    works = Works(seconds=0)
    schedule.run(DIAMOND, works)
    assert works.ended == list(DIAMOND)
    assert set(works.threads.values()) == {threading.main_thread()}


def test_no_more_stages_than_jobs_run_at_the_same_time() -> None:
    works = Works()
    schedule.run({f"stage-{number}": [] for number in range(9)}, works, jobs=3)
    assert max(map(len, works.beside.values())) >= 2  # beside itself, also those that followed one another
    assert len(works.ended) == 9


@pytest.mark.parametrize("alone", ["left", "right", "below"])
def test_a_stage_that_measures_durations_runs_alone(alone: str) -> None:
    works = Works()
    schedule.run(DIAMOND, works, jobs=2, alone={alone})
    assert works.beside[alone] == set() and len(works.ended) == 5


def test_a_failure_stops_what_has_not_begun_and_waits_for_what_runs() -> None:
    works = Works("left")
    schedule.run(DIAMOND, works, jobs=2)
    assert works.ended == ["first", "left", "right"]


def test_an_exception_interrupts_the_other_stages() -> None:
    interrupted = threading.Event()

    def work(stage: str) -> bool:
        if stage == "left":
            raise KeyboardInterrupt
        return stage != "right" or interrupted.wait(10)

    with pytest.raises(KeyboardInterrupt):
        schedule.run(DIAMOND, work, jobs=2, interrupt=interrupted.set)
    assert interrupted.is_set()


def test_a_stage_that_was_about_to_start_at_the_interruption_ends(tmp_path: Path) -> None:
    """Its process starts after the first signal to all stages that run."""
    stop = threading.Event()
    codes: list[int] = []

    def work(stage: str) -> bool:
        if stage == "left":
            raise KeyboardInterrupt
        assert stop.wait(10)
        time.sleep(0.5)
        with dvc.leashed(["sleep", "600"], os.environ) as running:
            codes.append(running.process.wait(60))
        return False

    with (
        pytest.raises(KeyboardInterrupt),
        cancelling.interrupting(stop) as interrupt,
    ):
        schedule.run({"left": [], "right": []}, work, jobs=2, interrupt=interrupt)
    assert codes[0] in (leash.ENDED, -signal.SIGTERM), "the latter before it has a handler"


def test_no_stage_starts_after_the_interruption(toy: Path) -> None:
    stop = threading.Event()
    stop.set()
    with (toy / "held").open() as held, pytest.raises(StageError, match=r"^first: interrupted before it began$"):
        repro.repro("first", toy, os.environ, print, held=held.fileno(), wait_seconds=60, stop=stop)
    assert not (toy / "first.txt").exists()


def test_stages_that_measure_durations_or_use_a_gpu() -> None:
    assert repro.marked(tiny.ROOT, "alone") == {"evaluate", "export"}
    without = {"download", "ingest", "validate", "package", "register"}
    assert repro.marked(tiny.ROOT, "gpu") == set(repro.graph(tiny.ROOT)) - without


LOCK = "schema: '2.0'\nstages:\n  {}:\n    cmd: a\n    outs:\n    - path: x\n  {}:\n    cmd: b\n  {}:\n    cmd: c\n"


def test_new_entries_of_the_lock_file_are_in_the_order_of_the_chain(tmp_path: Path) -> None:
    file = tmp_path / "dvc.lock"
    with dvc.ordered_lock_file(tmp_path, ["a", "b", "c"]):
        file.write_text(LOCK.format("c", "a", "b"))
    assert file.read_text() == (
        "schema: '2.0'\nstages:\n  a:\n    cmd: b\n  b:\n    cmd: c\n  c:\n    cmd: a\n    outs:\n    - path: x\n"
    )
    file.write_text(LOCK.format("z", "c", "a"))
    with dvc.ordered_lock_file(tmp_path, ["a", "b", "c"]):
        pass
    assert file.read_text() == LOCK.format("z", "c", "a"), "a file that others ordered stays as it is"


TOY = """\
stages:
  first: {cmd: echo 1 > first.txt, outs: [first.txt]}
  left: {cmd: python slow.py left 3, deps: [first.txt], outs: [left.txt]}
  right: {cmd: python slow.py right 1, deps: [first.txt], outs: [right.txt]}
  last: {cmd: "cat left.txt right.txt > last.txt", deps: [left.txt, right.txt], outs: [last.txt]}
"""
SLOW = """\
import pathlib, sys, time
name, seconds = sys.argv[1:]
beside = {"left": "right", "right": "left"}[name]
pathlib.Path(f"{name}.begun").touch()
deadline = time.monotonic() + float(pathlib.Path("patience").read_text())
while not pathlib.Path(f"{beside}.begun").exists() and time.monotonic() < deadline:
    time.sleep(0.05)
print("beside" if pathlib.Path(f"{beside}.begun").exists() else "alone", flush=True)
time.sleep(float(seconds))
pathlib.Path(f"{name}.txt").write_text(name)
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    tiny.git(tmp_path, "init", "--quiet")
    subprocess.run(dvc.command("init", "--quiet"), cwd=tmp_path, check=True)
    (tmp_path / "dvc.yaml").write_text(TOY)
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "held").touch()
    return tmp_path


def bring(toy: Path, jobs: int, patience: float) -> dict[str, list[str]]:
    """Run the toy chain; stage -> its output. `left` and `right` wait for each other for `patience` seconds."""
    for begun in toy.glob("*.begun"):
        begun.unlink()
    (toy / "patience").write_text(str(patience))
    said: dict[str, list[str]] = {}
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    graph = repro.graph(toy)
    with (toy / "held").open() as held:

        def work(stage: str) -> bool:
            log = said.setdefault(stage, []).append
            return repro.repro(stage, toy, environment, log, held=held.fileno(), wait_seconds=0)

        with dvc.ordered_lock_file(toy, list(graph)):
            schedule.run(graph, work, jobs=jobs)
    return said


@pytest.mark.slow  # eleven processes of DVC
def test_dvc_runs_independent_stages_at_the_same_time_and_its_lock_file_is_the_same(toy: Path) -> None:
    said = bring(toy, 2, 120)
    assert "beside" in said["left"] and "beside" in said["right"]
    together = (toy / "dvc.lock").read_bytes()
    assert together.index(b"left:") < together.index(b"right:"), "although right ended first"
    (toy / "dvc.lock").unlink()
    shutil.rmtree(toy / ".dvc" / "cache")
    assert "alone" in bring(toy, 1, 0)["left"]
    assert (toy / "dvc.lock").read_bytes() == together


@pytest.mark.slow
def test_the_result_of_a_stage_waits_for_another_dvc_command(toy: Path) -> None:
    """DVC gives up after 3 s by default, after the stage has run."""
    program = (
        "import pathlib, sys, time, zc.lockfile\n"
        "while not pathlib.Path('left.begun').exists(): time.sleep(0.05)\n"
        "time.sleep(1); lock = zc.lockfile.LockFile('.dvc/tmp/lock'); print('locked', flush=True); time.sleep(9)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=toy, stdout=subprocess.PIPE) as other:
        assert set(bring(toy, 1, 0)) == {"first", "left", "right", "last"}
        assert other.stdout is not None and other.stdout.read() == b"locked\n"
