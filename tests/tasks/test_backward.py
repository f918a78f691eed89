"""A batch that is split among threads, against the whole batch: gradients, losses, pictures, resuming, and the key."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from models.networks import compilation
from models.parallel import Workers
from tasks import train
from tasks.params import load
from tasks.training import checkpoint, previews, stores
from tasks.training import key as training_key
from tasks.training.backward import SplitBatch, WholeBatch, workers_for
from tasks.training.held_out import held_out_losses
from tasks.training.run import gather_tallies, snapshot


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def gradients(run, backward, steps=1):
    """Return the losses of the first batches and the gradients that they leave, float32 [P]."""
    run.network.zero_grad(set_to_none=True)
    losses = [backward(run.objective, run.batches.draw(step)) for step in range(steps)]
    left = [parameter.grad for parameter in run.network.parameters()]
    assert all(gradient is not None for gradient in left)
    return torch.cat(losses).detach(), torch.cat([gradient.flatten() for gradient in left]).clone()


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(("conditioning", "precision"), [("label", "no"), ("text", "bf16")])
def test_parts_have_the_losses_and_the_gradient_of_the_whole(prepared, workers, conditioning, precision):
    run = prepared(conditioning=conditioning, batch_size=32, precision=precision)
    split = SplitBatch(run.accelerator, run.module, Workers(workers))
    whole = gradients(run, WholeBatch(run.accelerator, run.module), steps=2)
    parts = gradients(run, split, steps=2)
    close = {"no": 1e-6, "bf16": 2e-2}[precision]
    for ours, wanted in zip(parts, whole, strict=True):
        assert (ours - wanted).norm() < close * wanted.norm()


def test_weights_of_samples_and_accumulated_parts_count_as_in_the_whole(prepared):
    """DreamBooth weighs the subject and the class images; an uneven split must not weigh them anew."""
    run = prepared(batch_size=40, gradient_accumulation=2)
    draw = run.batches.draw

    def weighed(step):
        batch = draw(step)
        assert len(batch.t) == 20
        return replace(batch, weight=torch.linspace(0, 3, 20))

    run.batches.draw = weighed
    whole = gradients(run, WholeBatch(run.accelerator, run.module))
    parts = gradients(run, SplitBatch(run.accelerator, run.module, Workers(3)))
    for ours, wanted in zip(parts, whole, strict=True):
        assert (ours - wanted).norm() < 1e-6 * wanted.norm()


def test_the_same_parts_give_the_same_bytes(prepared):
    run = prepared(batch_size=32)
    split = SplitBatch(run.accelerator, run.module, Workers(2))
    first = gradients(run, split)
    for _ in range(5):
        assert torch.equal(gradients(run, split)[1], first[1])


@pytest.mark.parametrize(
    "options",
    [{}, {"conditioning": "text", "precision": "bf16"}, {"architecture": "dit"}],
    ids=["unet", "text, bf16", "dit"],
)
def test_activations_that_are_computed_again_give_the_same_bytes_in_parts(prepared, options):
    """Also after the memory decided: then the number of workers, which the key has, is still the same."""
    run = prepared(batch_size=32, gradient_checkpointing=False, **options)
    split, passes = SplitBatch(run.accelerator, run.module, Workers(2)), []
    compilation.repeated_blocks(run.network)[0].register_forward_pre_hook(lambda *_: passes.append(1))
    stored, state = gradients(run, split, steps=2), torch.get_rng_state()
    assert len(passes) == 2 * 2
    run.network.checkpoint_gradients()
    for _ in range(5):
        again = gradients(run, split, steps=2)
        assert all(torch.equal(ours, wanted) for ours, wanted in zip(again, stored, strict=True))
    assert len(passes) == 2 * 2 * (1 + 2 * 5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("free", [1e9, 1e5])
def test_the_decision_by_memory_leaves_the_split_and_the_key(prepared, two_threads, monkeypatch, free):
    monkeypatch.setattr(stores, "free_memory", lambda device: free)
    auto = prepared(batch_size=32, gradient_checkpointing="auto", data_on_device="device")
    assert auto.network.down_blocks[0].recompute is (free == 1e5)
    assert auto.workers.count == 2 and isinstance(auto.backward, SplitBatch)
    monkeypatch.setattr(stores, "free_memory", lambda device: 1e9)
    assert prepared(batch_size=32, gradient_checkpointing="auto", data_on_device="device").folder == auto.folder


def test_the_number_of_threads_is_left_as_it_was(prepared, two_threads):
    run = prepared(batch_size=32)
    seen = []

    def objective(module, part):
        seen.append((len(part.t), torch.get_num_threads()))
        return run.objective(module, part)

    SplitBatch(run.accelerator, run.module, Workers(2))(objective, run.batches.draw(0))
    assert torch.get_num_threads() == 2
    assert seen == [(16, 1), (16, 1)]


@pytest.mark.parametrize(
    ("changes", "processes", "threads", "expected"),
    [
        ({}, 1, 2, 2),
        ({}, 1, 8, 4),
        ({}, 1, 1, 1),
        ({"batch_size": 16}, 1, 2, 1),
        ({"gradient_accumulation": 4}, 1, 2, 1),
        ({}, 2, 2, 1),
        ({"compile": True}, 1, 2, 1),
        ({"gradient_checkpointing": True}, 1, 2, 2),
        ({"gradient_checkpointing": "auto"}, 1, 2, 2),
        ({"dropout": 0.1}, 1, 2, 1),
    ],
)
def test_how_many_workers_share_a_batch(changes, processes, threads, expected, monkeypatch):
    """At least 16 images for each; one worker where the order of threads would matter, or could not be followed."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    params = load()
    model = params.model.model_copy(update={key: value for key, value in changes.items() if key == "dropout"})
    train = params.train.model_copy(update={"batch_size": 64} | {k: v for k, v in changes.items() if k != "dropout"})
    assert workers_for(model, train, processes) == expected


def test_a_split_run_continues_in_the_same_bytes(prepared, two_threads):
    split = {"batch_size": 32, "sample_every": 100}
    whole, first = prepared(**split), prepared(**split)
    assert whole.workers.count == first.workers.count == 2
    train.fit(whole, None, [], until=6)
    train.fit(first, None, [], until=3)
    checkpoint.save(first.folder, snapshot(first, gather_tallies(first)))
    second = prepared(**split)
    assert second.step == 3
    train.fit(second, None, [], until=6)
    for ours, wanted in zip(second.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(ours, wanted)


def test_the_key_holds_the_number_of_workers(prepared, two_threads, monkeypatch):
    found = []
    real = training_key.run_facts

    def run_facts(*arguments):
        found.append(real(*arguments))
        return found[-1]

    monkeypatch.setattr(training_key, "run_facts", run_facts)
    prepared(batch_size=32)
    monkeypatch.setattr(training_key, "workers_for", lambda *_: 1)
    prepared(batch_size=32)
    assert [facts.trajectory["workers"] for facts in found] == [2, 1]
    assert found[0].trajectory_key != found[1].trajectory_key


def test_held_out_losses_are_computed_at_once_and_are_those_of_one_worker(prepared, two_threads):
    run = prepared(batch_size=16)
    both, objective = threading.Barrier(2, timeout=30), run.objective

    def waiting(module, batch):
        both.wait()
        return objective(module, batch)

    assert len(run.held_out) == 2
    together = held_out_losses(replace(run, workers=Workers(2), objective=waiting))
    assert together == pytest.approx(held_out_losses(run), rel=1e-6)


def test_previews_of_two_workers_are_those_of_one(prepared, two_threads):
    run = prepared(batch_size=40)
    drawn = {}
    for threads in (2, 1):
        torch.set_num_threads(threads)
        with Image.open(previews.sample_grid(run)) as picture:
            drawn[threads] = np.asarray(picture).astype(int)
    assert np.abs(drawn[1] - drawn[2]).max() <= 1
    assert drawn[1].std() > 1
