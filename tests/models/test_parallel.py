"""Batches of images that several single-threaded workers compute at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models import device, parallel
from models.judges import classifier
from models.judges.clip import Clip
from models.judges.judge import Judge, JudgeInfo
from models.networks import guidance
from models.noise.samplers import Sampling
from models.pipeline import Pipeline, load_pipeline
from tests.support.model_outputs import write_pipeline
from tests.support.networks import randomised


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
    for count, where in ((31, "cpu"), (64, "cuda")):
        assert parallel.over_batches(lambda part: threading.get_ident(), count, 64, where) == [main]


def test_an_error_of_a_worker_is_raised(two_threads: None) -> None:
    def fail(part: slice) -> None:
        raise ValueError(f"slice {part.start}")

    with pytest.raises(ValueError, match="slice 0"):
        parallel.over_batches(fail, 64, 64)
    assert torch.get_num_threads() == 2


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    """A class-conditional pipeline with a guide and random weights."""
    write_pipeline(tmp_path / "pipeline")
    return load_pipeline(tmp_path / "pipeline")


def test_workers_draw_the_images_of_one_thread(pipeline: Pipeline, two_threads: None) -> None:
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

    functions = [lambda device: waiting(f"first {device}"), lambda device: waiting(f"second {device}")]
    assert parallel.at_once(functions) == ["first cpu 1", "second cpu 1"]
    assert parallel.at_once([]) == []


def test_a_single_function_keeps_all_threads(two_threads: None) -> None:
    assert parallel.at_once([lambda _: (threading.get_ident(), torch.get_num_threads())]) == [
        (threading.get_ident(), 2)
    ]


def test_every_device_takes_the_next_batch_when_it_is_free(two_devices: None) -> None:
    copies, both, rest = [], threading.Barrier(2, timeout=30), threading.Event()

    def copy(name: str) -> str:
        copies.append(name)
        return name

    def work(name: str, part: slice) -> tuple[str, slice]:
        if part.start < 20:
            both.wait()  # both devices work at once
        if part.start == 0:
            assert rest.wait(30), "one device does all other batches while the other is busy with the first"
        if part.stop == 45:
            rest.set()
        return name, part

    done = parallel.over_devices(work, copy, 45, 10, "cpu")
    assert [part for _, part in done] == [slice(k, min(k + 10, 45)) for k in range(0, 45, 10)]
    assert sorted(copies) == ["cpu:0", "cpu:1"]
    slow = done[0][0]
    assert [name == slow for name, _ in done] == [True, False, False, False, False]


def test_after_an_error_of_a_device_no_further_batch_is_begun(two_devices: None) -> None:
    begun, failed = [], threading.Event()

    def work(name: str, part: slice) -> None:
        begun.append(part.start)
        if name == "cpu:1":  # not the first device, whose error the caller would notice by itself
            failed.set()
            raise ValueError("the second device")
        assert failed.wait(30)
        time.sleep(0.01)  # lets the thread that failed run; without it, all batches fit in one turn of this thread

    with pytest.raises(ValueError, match="the second device"):
        parallel.over_devices(work, str, 1000, 1, "cpu")
    assert len(begun) < 1000


def test_more_devices_than_batches_stay_idle(two_devices: None) -> None:
    copies: list[str] = []
    assert parallel.over_devices(lambda name, part: part, copies.append, 5, 10, "cpu") == [slice(0, 5)]
    assert copies == ["cpu"]
    assert parallel.over_devices(lambda name, part: part, copies.append, 0, 10, "cpu") == []


def test_parts_in_turns_come_in_order_and_before_the_next_ones_begin(two_devices: None) -> None:
    begun: list[int] = []

    def work(part: int) -> int:
        begun.append(part)
        return part

    for part in (found := parallel.shared_in_turns(lambda name: work, range(5), "cpu")):
        assert part < len(begun) <= part + 2
    assert sorted(begun) == [0, 1, 2, 3, 4] and next(found, None) is None
    assert not list(parallel.shared_in_turns(lambda name: work, [], "cpu"))


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_two_devices_draw_the_bytes_of_one(pipeline: Pipeline, two_devices: None, monkeypatch, scale: float) -> None:
    seeds, labels, sampling = range(23), [i % 3 for i in range(23)], Sampling("ddpm", 3, guidance_scale=scale)
    monkeypatch.setattr(guidance, "joins", lambda device: True)
    used = set()
    monkeypatch.setattr(Pipeline, "on", lambda model, name: used.add(name) or replace(model, device=name))
    divided = pipeline.sample(seeds, labels, sampling, batch_size=5)
    assert used == {"cpu:0", "cpu:1"}
    monkeypatch.setattr(parallel, "devices_of", lambda device: (device,))
    assert divided.tobytes() == pipeline.sample(seeds, labels, sampling, batch_size=5).tobytes()


def test_two_devices_measure_the_bytes_of_one(two_devices: None, monkeypatch) -> None:
    monkeypatch.setattr(classifier, "APPLY_BATCH", 7)
    networks = randomised(classifier.Classifier(1, 8, 3)), randomised(Clip(1, 8, 20))
    judge = Judge(JudgeInfo(["a", "b", "c"], None, {"channels": 1, "size": 8}, 0), *networks)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)

    def measured() -> list[bytes]:
        return [judge.features(pixels).tobytes(), judge.clip_image_embeds(pixels).tobytes()]

    names = set()
    monkeypatch.setattr(parallel, "enter", names.add)
    divided = measured()
    assert names == {"cpu:0", "cpu:1"}
    monkeypatch.setattr(parallel, "devices_of", lambda device: (device,))
    assert divided == measured()


def test_all_gpus_of_the_first_ones_model_work(monkeypatch) -> None:
    names = ["H100", "H100", "T4", "H100"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    assert device.devices_of("cuda") == ("cuda:0", "cuda:1", "cuda:3")
    assert device.devices_of("cuda:1") == ("cuda:1",)
    assert device.devices_of("cpu") == ("cpu",)
    del names[1:]
    assert device.devices_of("cuda") == ("cuda",)


def test_only_a_numbered_gpu_is_made_the_current_one(monkeypatch) -> None:
    """`torch.cuda.set_device` refuses "cuda", which a machine with one GPU has."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cuda", "cpu", "cuda:1"):
        device.enter(name)
    assert chosen == [torch.device("cuda:1")]


def test_a_network_is_copied_to_another_device_and_not_moved() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).requires_grad_(False)
    network.append(network[0])  # shared weights stay shared
    copied = device.placed(network, "meta")
    assert {weights.device.type for weights in copied.state_dict().values()} == {"meta"}
    assert copied[2].weight is copied[0].weight
    assert {weights.device.type for weights in network.state_dict().values()} == {"cpu"}
    assert device.placed(network, "cpu") is network
    assert device.placed(None, "cpu") is None


def test_a_whole_pipeline_is_copied(pipeline: Pipeline) -> None:
    copied = pipeline.on("meta")
    networks = [copied.network, *copied.companions.values()]
    assert {weights.device.type for network in networks for weights in network.parameters()} == {"meta"}
    assert copied.device == "meta" and pipeline.on("cpu") is pipeline


@pytest.mark.gpu
def test_all_gpus_draw_and_measure_the_bytes_of_one(pipeline: Pipeline, monkeypatch) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there are not two GPUs")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # its search could choose differently
    seeds, labels, sampling = range(40), [i % 3 for i in range(40)], Sampling("ddpm", 5, guidance_scale=1.5)
    every, one = (pipeline.on(name).sample(seeds, labels, sampling, batch_size=8) for name in ("cuda", "cuda:0"))
    assert every.tobytes() == one.tobytes()
    network = randomised(classifier.Classifier(1, 8, 3)).cuda()
    pixels = np.random.default_rng(0).integers(0, 256, (2000, 1, 8, 8), dtype=np.uint8)
    info = JudgeInfo(["a", "b", "c"], None, {"channels": 1, "size": 8}, 0)
    found = [Judge(info, network, device=name).features(pixels).tobytes() for name in ("cuda", "cuda:0")]
    assert found[0] == found[1]
