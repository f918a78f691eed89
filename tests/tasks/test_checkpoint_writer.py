"""Checkpoints that a thread writes while the training continues."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from tasks import train
from tasks.runtime.errors import StageError
from tasks.training import checkpoint
from tasks.training.checkpoint import Checkpoint, Writer, host_copies
from tasks.training.run import gather_tallies, snapshot

SECONDS = 20
OFTEN = {"steps": 100, "log_every": 100, "checkpoint_every": 2, "sample_every": 100}


class HeldBack:
    """`checkpoint.save`, which waits until it is let go."""

    def __init__(self, monkeypatch) -> None:
        self.begun, self.go, self.save = threading.Event(), threading.Event(), checkpoint.save
        self.steps: list[int] = []
        monkeypatch.setattr(checkpoint, "save", self)

    def __call__(self, folder, state) -> None:
        self.begun.set()
        assert self.go.wait(SECONDS)
        self.save(folder, state)
        self.steps.append(state.step)


def state(step: int, value: float = 0.0) -> Checkpoint:
    return Checkpoint(step, {"model": {"weight": torch.full((3,), value)}}, [], {})


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_the_training_continues_while_a_checkpoint_is_written(prepared, monkeypatch):
    """The checkpoint of step 2 is written after step 4, and holds the weights of step 2."""
    run = prepared(**OFTEN)
    train.fit(run, None, [], until=2)
    now = snapshot(run, gather_tallies(run))
    checkpoint.save(run.folder / "synchronous", now)
    save, until = checkpoint.save, time.monotonic() + SECONDS

    def save_later(folder, state):
        while run.step < 4 and time.monotonic() < until:
            time.sleep(0.01)
        assert run.step == 4, "the training waits for its checkpoint"
        save(folder, state)

    monkeypatch.setattr(checkpoint, "save", save_later)
    run.checkpoints.save(now)
    train.fit(run, None, [], until=4)
    assert bytes_of(run.folder / "step-00000002") == bytes_of(run.folder / "synchronous" / "step-00000002")


def test_one_at_a_time_and_in_order(tmp_path, monkeypatch):
    held, writer = HeldBack(monkeypatch), Writer(tmp_path)
    writer.save(state(1))
    second = threading.Thread(target=writer.save, args=[state(2)])
    second.start()
    second.join(0.1)
    assert second.is_alive(), "the second waits for the first"
    held.go.set()
    second.join(SECONDS)
    assert writer.newest_before(9).name == "step-00000002", "it waits for what is being written"
    assert held.steps == [1, 2]


def test_an_error_of_the_thread_is_raised_at_the_next_checkpoint_or_the_end(tmp_path, monkeypatch):
    def full(folder, state):
        raise StageError("no space left")

    writer = Writer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        writer.save(state(1))
        with pytest.raises(StageError, match="no space left"):
            writer.wait()
        writer.save(state(2))
        with pytest.raises(StageError, match="no space left"):
            writer.save(state(3))
        writer.save(state(4))
        writer.close()  # after another error, which it does not hide
    writer = Writer(tmp_path)
    writer.save(state(5))
    writer.close()
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-00000005"]


def test_copies_are_contiguous_and_do_not_change_with_their_source():
    source = torch.arange(16.0).reshape(1, 2, 2, 4).contiguous(memory_format=torch.channels_last)
    copy = host_copies({"x": source})["x"]
    before = source.clone()
    source += 1
    assert copy.is_contiguous() and torch.equal(copy, before)
