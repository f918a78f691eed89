"""Batches of images that several single-threaded workers compute at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from models import parallel
from models.noise.samplers import Sampling
from models.pipeline import load_pipeline


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_slices_come_in_order_and_share_the_memory_of_one_batch(two_threads: None) -> None:
    slices = parallel.over_batches(lambda part: part, 200, 64)
    assert [row for part in slices for row in range(200)[part]] == list(range(200))
    assert max(len(range(200)[part]) for part in slices) == 32


def test_two_workers_of_one_thread_work_at_once(two_threads: None) -> None:
    together = threading.Barrier(2, timeout=30)

    def work(part: slice) -> int:
        together.wait()
        return torch.get_num_threads()

    assert parallel.over_batches(work, 64, 64) == [1, 1]
    assert torch.get_num_threads() == 2


def test_few_images_and_a_gpu_get_whole_batches(two_threads: None) -> None:
    main = threading.get_ident()
    for count, device in ((31, "cpu"), (64, "cuda")):
        assert parallel.over_batches(lambda part: threading.get_ident(), count, 64, device) == [main]


def test_an_error_of_a_worker_is_raised(two_threads: None) -> None:
    def fail(part: slice) -> None:
        raise ValueError(f"slice {part.start}")

    with pytest.raises(ValueError, match="slice 0"):
        parallel.over_batches(fail, 64, 64)
    assert torch.get_num_threads() == 2


def test_workers_draw_the_images_of_one_thread(exported, two_threads: None) -> None:
    pipeline = load_pipeline(exported / "outputs" / "pipeline")
    seeds, labels = range(40), [i % 3 for i in range(40)]
    together = pipeline.sample(seeds, labels, Sampling("ddpm", 5, guidance_scale=1.5))
    torch.set_num_threads(1)
    alone = pipeline.sample(seeds, labels, Sampling("ddpm", 5, guidance_scale=1.5))
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_functions_run_at_once_and_return_in_their_order(two_threads: None) -> None:
    together = threading.Barrier(2, timeout=30)

    def waiting(name: str) -> str:
        together.wait()
        return f"{name} {torch.get_num_threads()}"

    assert parallel.at_once([lambda: waiting("first"), lambda: waiting("second")]) == ["first 1", "second 1"]
    assert parallel.at_once([]) == []


def test_a_single_function_keeps_all_threads(two_threads: None) -> None:
    assert parallel.at_once([lambda: (threading.get_ident(), torch.get_num_threads())]) == [(threading.get_ident(), 2)]
