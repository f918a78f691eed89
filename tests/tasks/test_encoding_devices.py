"""Encoding on several GPUs, here stub devices that compute on the CPU, in batches by the memory of a device."""

from __future__ import annotations

import contextlib
import io
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from models import autoencoder_training
from models.autoencoder_training import AutoencoderConfig
from models.networks import autoencoder
from tasks.encoding import encoder
from tasks.encoding.blocks import Blocks
from tasks.encoding.encoder import Encoder
from tasks.encoding.rows import Missing
from tasks.encoding.transform import Chunk
from tasks.params import EncodeParams
from tasks.pictures.digests import digests
from tasks.runtime import cluster

GB = 1 << 30


@pytest.fixture(scope="module")
def network() -> autoencoder.Autoencoder:
    torch.manual_seed(0)
    config = AutoencoderConfig(channels=3, latent_channels=2, widths=(8, 16), layers_per_block=1)
    return autoencoder_training.build(config).eval().requires_grad_(False)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let "cuda" stand for two devices, and return those that threads have entered."""
    entered: list[str] = []
    monkeypatch.setattr(encoder, "devices_of", lambda device: ("stub:0", "stub:1"))
    monkeypatch.setattr(encoder, "enter", entered.append)
    monkeypatch.setattr(encoder, "placed", lambda network, name: network)
    monkeypatch.setattr(encoder, "memory_of", lambda device: GB)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield entered
    torch.set_num_threads(threads)


def chunks(count: int, size: int = 3) -> list[Chunk]:
    made = []
    for number in range(count):
        files = []
        for image in range(size):
            pixels = np.random.default_rng((number, image)).integers(0, 256, (16, 16, 3), np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            files.append((f"{number}-{image}", file.getvalue(), 256))
        made.append(Chunk((16, 16), files))
    return made


def latents(network: autoencoder.Autoencoder, given: list[Chunk]) -> list[tuple[list[str], bytes]]:
    with ThreadPoolExecutor(2) as pool:
        found = list(Encoder(pool, 2, network, 3, True, "cuda").encoded(given))
    return [
        ([name for name, _, _ in chunk.images], tensors["mean"].float().numpy().tobytes()) for chunk, tensors in found
    ]


def test_two_gpus_encode_the_bytes_of_one_in_the_order_of_the_chunks(network, gpus, monkeypatch):
    both, encode = threading.Barrier(2, timeout=30), encoder.encode_pixels
    begun = iter(range(100))

    def together(*arguments):
        if next(begun) < 2:
            both.wait()  # both devices work at once
        return encode(*arguments)

    given = chunks(7)
    with monkeypatch.context() as patched:
        patched.setattr(encoder, "encode_pixels", together)
        divided = latents(network, given)
    assert sorted(gpus) == ["stub:0", "stub:1"]
    monkeypatch.setattr(encoder, "devices_of", lambda device: ("stub:0",))
    assert divided == latents(network, given)
    assert [names[0] for names, _ in divided] == [f"{number}-0" for number in range(7)]


def test_an_error_of_a_gpu_is_raised(network, gpus, monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for step in ("encode_pixels", "placed"):
        with monkeypatch.context() as patched:
            patched.setattr(encoder, step, fail)
            with pytest.raises(torch.OutOfMemoryError):
                latents(network, chunks(5))


def test_a_batch_and_a_chunk_are_as_large_as_the_memory_allows(network, gpus, monkeypatch):
    with ThreadPoolExecutor(1) as pool:
        gpu, cpu = (Encoder(pool, 1, network, 3, False, device) for device in ("cuda", "cpu"))
        sizes = {side: gpu.at_once((side, side)) for side in (16, 256, 512, 1024, 4096)}
        assert sizes == {16: 256, 256: 16, 512: 4, 1024: 1, 4096: 1}
        assert gpu.at_once((1024, 256)) == sizes[512], "buckets of one area have one size"
        assert [gpu.chunk_size((side, side)) for side in (16, 256)] == [256, 64]
        assert cpu.at_once((16, 16)) is None
        assert cpu.chunk_size((16, 16)) == 64
        passed = []
        hook = network.encoder.register_forward_hook(lambda _, inputs, __: passed.append(len(inputs[0])))
        (_, tensors), *_ = gpu.encoded(chunks(1))
        hook.remove()
    assert passed == [256], "the last batch is padded to the size of all others"
    assert tensors["mean"].shape[0] == 3


def test_bfloat16_latents_are_nearly_those_of_float32(network):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), np.uint8)
    exact, lower = (autoencoder.encode(network, pixels, precision) for precision in ("no", "bf16"))
    for expected, found in zip(exact, lower, strict=True):
        assert found.dtype == torch.float32
        error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert 1e-5 < error < 0.02


class Actors:
    """The processes of a cluster, as objects of this one."""

    def __init__(self, _, allotment, make, *arguments):
        self.count = allotment.actors
        self.states = [make(*arguments) for _ in range(self.count)]
        self._turns = itertools.cycle(self.states)

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(next(self._turns), *arguments))
        return future

    def each(self, function, *arguments):
        return [function(state, *arguments) for state in self.states]


def test_a_cluster_of_gpus_encodes_in_the_batches_of_one_machine(network, monkeypatch, tmp_path):
    """Batches fit the smallest memory, so that every process computes alike."""
    files = [image for chunk in chunks(30, 10) for image in chunk.images]
    names = digests([sha256 for sha256, _, _ in files])
    missing = Missing(names, np.zeros(len(names), np.int16), [(16, 16)])
    monkeypatch.setattr(encoder, "read_encoded", lambda images, wanted: iter(files))
    monkeypatch.setattr(encoder, "load_autoencoder", lambda folder, device="cpu": network)
    monkeypatch.setattr(encoder, "best_device", lambda: "cpu:0")
    monkeypatch.setattr(encoder.cluster, "joined", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(encoder.cluster, "allotted", lambda *_: cluster.Allotment(2, 3, 1))
    made, sizes, encode = [], [], encoder.encode_pixels
    monkeypatch.setattr(encoder.cluster, "Actors", lambda *given: made.append(Actors(*given)) or made[0])

    def noting(network, pixels, mirrored, precision, at_once):
        sizes.append((len(pixels), at_once))
        return encode(network, pixels, mirrored, precision, at_once)

    monkeypatch.setattr(encoder, "encode_pixels", noting)
    params = EncodeParams(workers=2, horizontal_flip=True)
    small = next(GB >> halved for halved in range(10) if autoencoder.images_at_once(network, 256, GB >> halved) == 128)
    least = 128
    assert encoder.CHUNK < least < autoencoder.images_at_once(network, 256, GB) and least < len(files)
    stored = []
    for name, memories in (("_encode_missing", [small]), ("_encode_on_cluster", [GB, small])):
        sizes.clear()
        memory = itertools.cycle(memories)
        monkeypatch.setattr(encoder, "memory_of", lambda device, memory=memory: next(memory))
        blocks = Blocks(tmp_path / name, {})
        getattr(encoder, name)(tmp_path, tmp_path, 3, missing, blocks, params)
        stored.append(blocks.take([sha256 for sha256, _, _ in files]))
        assert {size for _, size in sizes} == {least} and sizes[0][0] == least
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in ("mean", "std"))
    assert [state.pool._max_workers for state in made[0].states] == [3, 3]


def test_actors_take_a_gpu_each_and_its_share_of_the_processors():
    class Ray:
        def __init__(self, **resources):
            self.cluster_resources = lambda: resources

    assert cluster.allotted(Ray(CPU=32.0, GPU=4.0), 16) == cluster.Allotment(4, 8, 1)
    assert cluster.allotted(Ray(CPU=32.0, GPU=4.0), 2) == cluster.Allotment(2, 8, 1)
    assert cluster.allotted(Ray(CPU=4.0), 3) == cluster.Allotment(3, 1, 0)
