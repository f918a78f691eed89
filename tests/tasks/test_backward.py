"""The backward pass of a batch that is split among threads, against that of the whole batch."""

from __future__ import annotations

import pytest
import torch

from tasks.params import load
from tasks.training.backward import SplitBatch, WholeBatch, workers_for


def gradients(run, backward, steps=1):
    """Return the losses of the first batches and the gradients that they leave, float32 [P]."""
    run.network.zero_grad(set_to_none=True)
    losses = [backward(run.objective, run.batches.draw(step)) for step in range(steps)]
    left = [parameter.grad for parameter in run.network.parameters()]
    assert all(gradient is not None for gradient in left)
    return torch.cat(losses).detach(), torch.cat([gradient.flatten() for gradient in left]).clone()


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize(("conditioning", "precision"), [("label", "no"), ("text", "bf16")])
def test_parts_have_the_losses_and_the_gradient_of_the_whole(prepared, workers, conditioning, precision):
    run = prepared(conditioning=conditioning, batch_size=32, precision=precision)
    split = SplitBatch(run.accelerator, run.module, workers)
    whole = gradients(run, WholeBatch(run.accelerator, run.module), steps=2)
    parts = gradients(run, split, steps=2)
    close = {"no": 1e-5, "bf16": 2e-2}[precision]
    for ours, wanted in zip(parts, whole, strict=True):
        assert (ours - wanted).norm() < close * wanted.norm()


def test_the_same_parts_give_the_same_bytes(prepared):
    run = prepared(batch_size=32)
    split = SplitBatch(run.accelerator, run.module, 2)
    first = gradients(run, split)
    for _ in range(5):
        assert torch.equal(gradients(run, split)[1], first[1])


def test_the_number_of_threads_is_left_as_it_was(prepared, monkeypatch):
    run = prepared(batch_size=32)
    seen = []

    def objective(module, part):
        seen.append((len(part.t), torch.get_num_threads()))
        return run.objective(module, part)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        SplitBatch(run.accelerator, run.module, 2)(objective, run.batches.draw(0))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
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
        ({"gradient_checkpointing": True}, 1, 2, 1),
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
