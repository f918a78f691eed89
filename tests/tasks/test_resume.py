"""Exact resume: a training that was killed, stopped or damaged ends in the same bytes as an undisturbed one."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.train_inputs import (
    ROOT,
    checkpoints,
    command,
    copy_of,
    dvc_tree,
    environment,
    kill_when,
    results,
    run,
    start_warm,
    train_here,
    write_inputs,
    write_params,
)

KILLED = -signal.SIGKILL
SEED = int(os.environ.get("AFTERIMAGE_DRILL_SEED") or 0)
ONE_PROCESS, TWO_PROCESSES, SHARDED = (
    {"AFTERIMAGE_ACCELERATE": str(ROOT / "infra" / "accelerate" / name)}
    for name in ("cpu.yaml", "cpu_2proc.yaml", "cpu_fsdp.yaml")
)
TWO_PROCESSES |= {"ACCELERATE_USE_CPU": "true"}
SHARDED |= {"ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, migrated_database):
    """Return the folder of an undisturbed training of 60 steps with dropout, in this process.

    It keeps a guide between two checkpoints.
    """
    folder = tmp_path_factory.mktemp("undisturbed")
    write_inputs(folder)
    write_params(folder, dropout=0.2, guide_step=25)
    with pytest.MonkeyPatch.context() as patch:
        train_here(folder, patch, migrated_database)
    assert "pipeline/guide/diffusion_pytorch_model.safetensors" in results(folder)
    return folder


@pytest.fixture
def continued(undisturbed, tmp_path, monkeypatch, migrated_database, capsys):
    """Return a function that continues a training in this process, checks its results and returns what it printed."""

    def call() -> tuple[str, str]:
        capsys.readouterr()
        train_here(tmp_path, monkeypatch, migrated_database)
        assert results(tmp_path) == results(undisturbed)
        return tuple(capsys.readouterr())

    return call


def start(folder: Path, database: Path, arguments: list[str] | None = None, **more: str) -> subprocess.Popen[str]:
    """Start the training, or the command `arguments`, in a new session, with its output in one pipe."""
    return subprocess.Popen(
        arguments or command(folder),
        cwd=folder if arguments else ROOT,
        env=environment(folder, database) | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_at(folder: Path, database: Path, happens, **start_options) -> int:
    """Start a training and send SIGKILL to it and its children as soon as `happens()`; returns its exit code."""
    process = start(folder, database, **start_options)
    kill_when(process, happens, kill=lambda: kill_tree(process))
    process.stdout.close()
    return process.returncode


def kill_warm_at(folder: Path, database: Path, happens) -> int:
    """The same for a training that has no packages to load."""
    process = start_warm(folder, database)
    kill_when(process, happens)
    return process.returncode


def kill_tree(process: subprocess.Popen[str]) -> None:
    """Send SIGKILL to a process and its children, which have separate sessions in a training of several processes."""
    everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in everything:
        with suppress(psutil.NoSuchProcess):
            one.suspend()  # so that none reacts to the end of another
    for one in everything:
        with suppress(psutil.NoSuchProcess):
            one.kill()


def has_step(folder: Path, step: int):
    return lambda: any((folder / "scratch" / "train").glob(f"*/step-{step:08d}/manifest.json"))


def writes_a_checkpoint(folder: Path):
    return lambda: any((folder / "scratch" / "train").glob("*/.step-*.tmp"))


@pytest.mark.slow
def test_killed_five_times_ends_in_the_same_bytes(undisturbed, tmp_path, migrated_database, continued):
    copy_of(undisturbed, tmp_path)
    writes = writes_a_checkpoint(tmp_path)
    moments = (writes, has_step(tmp_path, 10), writes, has_step(tmp_path, 30), has_step(tmp_path, 40))
    assert [kill_warm_at(tmp_path, migrated_database, moment) for moment in moments] == [KILLED] * 5
    assert "continues at step" in continued()[0]


@pytest.mark.slow
def test_killed_under_dvc_repro_ends_in_the_same_bytes(undisturbed, tmp_path, migrated_database):
    """The stage of dvc.yaml, killed together with DVC, which deletes the outputs before each run.

    Once: `test_killed_five_times_ends_in_the_same_bytes` has the other moments.
    """
    dvc_tree(undisturbed, tmp_path)
    repro = [sys.executable, "-m", "dvc", "repro", "train"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    assert kill_at(tmp_path, migrated_database, has_step(tmp_path, 40), arguments=repro, PATH=path) == KILLED
    process = start(tmp_path, migrated_database, repro, PATH=path)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "continues at step" in output
    assert results(tmp_path, "outputs", "reports/train") == results(undisturbed)


def signalled_at(folder: Path, database: Path, step: int, number: int, **more: str) -> tuple[int, str]:
    """Start a training and send a signal to that process alone; returns its exit code and output."""
    if not more:
        return warm_signalled_at(folder, database, step, number)
    process = start(folder, database, **more)
    while not has_step(folder, step)():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def warm_signalled_at(folder: Path, database: Path, step: int, number: int) -> tuple[int, str]:
    process = start_warm(folder, database)
    while not has_step(folder, step)():
        assert process.poll() is None, process.output()
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait(timeout=60), process.output()


@pytest.mark.parametrize(("number", "code", "more"), [(signal.SIGTERM, 143, {}), (signal.SIGINT, 130, ONE_PROCESS)])
def test_a_signal_saves_a_checkpoint_and_sets_the_code(
    undisturbed, tmp_path, migrated_database, continued, number, code, more
):
    """The same if accelerate's launcher receives the signal."""
    copy_of(undisturbed, tmp_path)
    left, output = signalled_at(tmp_path, migrated_database, 10, number, **more)
    assert left == code, output
    assert "the same command continues" in output
    assert int(re.search(r"continues at step (\d+)", continued()[0])[1]) > 10


def test_damaged_newest_checkpoint_falls_back(undisturbed, tmp_path, continued):
    copy_of(undisturbed, tmp_path, "scratch")
    newest = checkpoints(tmp_path / "scratch")[-1]
    damaged = bytearray((newest / "model.safetensors").read_bytes())
    damaged[-1] ^= 1
    (newest / "model.safetensors").write_bytes(damaged)
    printed, warned = continued()
    assert f"{newest.name} is damaged" in warned
    assert "continues at step 50 of 60" in printed


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("optimizer", "processes"),
    [("adamw", TWO_PROCESSES), ("muon", TWO_PROCESSES), ("adamw", SHARDED), ("muon", SHARDED)],
    ids=["adamw", "muon", "adamw-sharded", "muon-sharded"],
)
def test_two_processes_killed_and_continued(tmp_path, migrated_database, optimizer, processes):
    """Started by `accelerate launch` with the configurations in infra/, on the CPU: whole networks, or sharded ones."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        write_inputs(folder)
        write_params(folder, dropout=0.2, steps=60, optimizer=optimizer)
    assert kill_at(killed, migrated_database, has_step(killed, 10), **processes) == KILLED
    process = start(killed, migrated_database, **processes)
    workers = paused_at(process, has_step(killed, 20))
    process.send_signal(signal.SIGTERM)
    for worker in workers:
        worker.resume()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 143, output
    assert "the same command continues" in output
    assert checkpoints(killed / "scratch")[-1].name < "step-00000060", "it ended before the last step"
    for folder in (whole, killed):
        process = start(folder, migrated_database, **processes)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
    assert "continues at step" in output
    assert results(killed) == results(whole)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("victims", [(0,), (1,), (0, 1)], ids=["first", "second", "both"])
def test_sharded_processes_killed_at_random_steps_end_in_the_same_bytes(tmp_path, migrated_database, victims):
    """Processes are killed, and not their launcher, which ends with an error; the other process does not stay."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        write_inputs(folder)
        write_params(folder, dropout=0.2, steps=100)
    process = start(whole, migrated_database, **SHARDED)
    seconds = seconds_between(process, has_step(whole, 10), has_step(whole, 30)) / 2
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    chance = random.Random(SEED + sum(victims))
    for _ in range(3):
        found = checkpoints(killed / "scratch")
        step = int(found[-1].name.removeprefix("step-")) if found else 0
        process = start(killed, migrated_database, **SHARDED)
        workers = workers_at(process, has_step(killed, step - step % 10 + 10))
        time.sleep(chance.uniform(0, seconds))
        for rank in victims:
            workers[rank].kill()
        output, _ = process.communicate(timeout=120)
        assert process.returncode not in (0, 143), output
        assert psutil.wait_procs(list(workers.values()), timeout=30)[1] == []
    process = start(killed, migrated_database, **SHARDED)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "continues at step" in output
    assert results(killed) == results(whole)


def seconds_between(process: subprocess.Popen[str], first, second) -> float:
    """Measure the time from one event of a training to another."""
    moments = []
    for happens in (first, second):
        while not happens():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.002)
        moments.append(time.monotonic())
    return moments[1] - moments[0]


def workers_at(process: subprocess.Popen[str], happens) -> dict[int, psutil.Process]:
    """Wait until `happens()`; returns the processes of a training by rank."""
    seconds_between(process, happens, happens)
    return {int(worker.environ()["RANK"]): worker for worker in psutil.Process(process.pid).children()}


def paused_at(process: subprocess.Popen[str], happens) -> list[psutil.Process]:
    """Suspend the children of a process as soon as `happens()`, so that they do not end first on a fast machine."""
    while not happens():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children()
    for worker in workers:
        worker.suspend()
    return workers


def test_a_signal_before_the_processes_of_a_training_start_is_obeyed(tmp_path, migrated_database):
    """The launcher imports packages for seconds, before any process exists that could receive the signal."""
    write_inputs(tmp_path)
    write_params(tmp_path)
    process = start(tmp_path, migrated_database, **TWO_PROCESSES)
    while not handles(process.pid, signal.SIGTERM):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert not (tmp_path / "scratch" / "train").exists()


def handles(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (number - 1) & 1)


@pytest.mark.slow
def test_processes_end_when_their_launcher_is_killed(tmp_path, migrated_database):
    """They save a checkpoint, as on SIGTERM, and the same command continues."""
    write_inputs(tmp_path)
    write_params(tmp_path)
    process = start(tmp_path, migrated_database, **TWO_PROCESSES)
    workers = paused_at(process, has_step(tmp_path, 10))
    process.kill()
    process.wait()
    for worker in workers:
        worker.resume()
    output, _ = process.communicate(timeout=60)
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    assert output.count("the same command continues") == len(workers) == 2
    assert "step-00000010" < checkpoints(tmp_path / "scratch")[-1].name < "step-00000060"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_random_moments_ends_in_the_same_bytes(undisturbed, tmp_path, migrated_database, seed):
    """Five kills each: two while a checkpoint is written, three at a random moment between start and end."""
    copy_of(undisturbed, tmp_path)
    chance = random.Random(seed)
    started = time.monotonic()
    kill_at(tmp_path, migrated_database, has_step(tmp_path, chance.choice((10, 20))))
    reach = time.monotonic() - started

    def after(seconds: float):
        until = time.monotonic() + seconds
        return lambda: time.monotonic() > until

    writes = [writes_a_checkpoint(tmp_path)] * 2
    moments = chance.sample([*writes, *(None for _ in range(2))], 4)
    for moment in moments:
        kill_at(tmp_path, migrated_database, moment or after(chance.uniform(0, 1.5 * reach)))
    done = run(tmp_path, migrated_database)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path) == results(undisturbed)
