"""Batches: epochs, accumulated parts and processes, condition dropout, and the two stores."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.training import stores
from tasks.training.batches import Batches, DrawConfig, open_conditioning
from tasks.training.stores import Resident, Streamed, open_store
from tests.support.train_inputs import uniform, write_inputs


def opened(tmp_path, where="auto", conditioning="label", **options) -> Batches:
    """Open the tiny data set; `options` are those of `DrawConfig`."""
    if not (tmp_path / "latents").exists():
        write_inputs(tmp_path, conditioning)
    defaults = {
        "batch_size": 16,
        "timesteps": uniform(50),
        "condition_dropout": 0.25,
        "horizontal_flip": False,
        "seed": 1,
    }
    device = torch.device("cpu")
    conditions = open_conditioning(tmp_path / "latents", where, device)
    store = open_store(tmp_path / "latents", "train", where, device)
    return Batches(store, conditions, DrawConfig(**defaults | options), device)


def test_an_epoch_visits_every_image_once_across_processes(tmp_path):
    rows = [
        row
        for step in range(6)
        for process in range(2)
        for row in opened(tmp_path, batch_size=8, process=process, processes=2).rows(step).tolist()
    ]
    assert sorted(rows) == list(range(96))


def test_accumulated_parts_make_the_whole_batch(tmp_path):
    whole = opened(tmp_path).rows(3).tolist()
    parts = opened(tmp_path, parts=4)
    assert [row for part in range(4) for row in parts.rows(3, part).tolist()] == whole


def test_batch_larger_than_an_epoch_wraps_into_the_next(tmp_path):
    rows = opened(tmp_path, batch_size=200).rows(0).tolist()
    assert sorted(rows[:96]) == list(range(96)) and rows[96:192] != rows[:96]


def test_dropped_set_changes_every_epoch_at_its_rate(tmp_path):
    drawn = opened(tmp_path)

    def dropped(epoch):
        steps = range(epoch * 6, epoch * 6 + 6)
        return {
            int(row)
            for step in steps
            for row, condition in zip(drawn.rows(step), drawn.draw(step).condition, strict=True)
            if condition == 2
        }

    epochs = [dropped(epoch) for epoch in range(20)]
    assert len({frozenset(epoch) for epoch in epochs}) == 20
    assert np.mean([len(epoch) for epoch in epochs]) / 96 == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("conditioning", ["none", "label", "text"])
def test_streamed_shards_draw_the_same_bits(tmp_path, conditioning):
    write_inputs(tmp_path, conditioning, shard_size=17)
    options = {"horizontal_flip": True, "parts": 2, "conditioning": conditioning}
    kept, streamed = (opened(tmp_path, where, **options) for where in ("device", "stream"))
    assert type(kept.store) is not type(streamed.store)
    # in order, as training draws them, then as a resumed run and a measurement in between do
    for step, part in [(0, 0), (0, 1), (1, 0), (1, 1), (9, 1), (3, 0), (10, 0)]:
        a, b = kept.draw(step, part), streamed.draw(step, part)
        for name in ("x0", "eps", "t", "condition"):
            ours, theirs = getattr(a, name), getattr(b, name)
            assert (ours is None and theirs is None) or torch.equal(ours, theirs), name


def test_streamed_captions_are_read_ahead(tmp_path, monkeypatch):
    """In order, every batch but the first is read before it is asked for, in a thread."""
    write_inputs(tmp_path, "text", shard_size=17)
    streamed, threads = opened(tmp_path, "stream", "text", parts=2), []
    read = Streamed._read

    def counted(store, rows):
        threads.append((store is streamed.texts, threading.current_thread() is threading.main_thread()))
        return read(store, rows)

    monkeypatch.setattr(Streamed, "_read", counted)
    for step in range(4):
        for part in range(2):
            streamed.draw(step, part)
    assert threads.count((True, True)) == threads.count((False, True)) == 1


def test_a_data_set_is_in_memory_once(tmp_path, monkeypatch):
    """The memory of the process after each block; the mapped file is not counted."""
    size = 64 * 2**20
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, (size // 1024, 1024))[:] = 7
    copyto, memory = np.copyto, []

    def copied(target, block):
        copyto(target, block)
        memory.append(anonymous_bytes())

    monkeypatch.setattr(np, "copyto", copied)
    before = anonymous_bytes()
    store = Resident([{"x": np.load(tmp_path / "x.npy", mmap_mode="r")}], torch.device("cpu"))
    assert len(memory) == size // stores.BLOCK_BYTES
    assert max(memory) - before < 1.1 * size
    assert store.columns["x"].shape == (size // 1024, 1024) and bool((store.columns["x"] == 7).all())


def anonymous_bytes() -> int:
    """Return the memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def test_what_does_not_fit_is_streamed(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    size = 96 * (64 + 8)
    for free, where in (
        (size / stores.MEMORY_SHARE - 1, "streamed"),
        (size / stores.MEMORY_SHARE + 1, "on the device"),
    ):
        monkeypatch.setattr(stores, "free_memory", lambda device, free=free: free)
        assert opened(tmp_path).store.where == where
