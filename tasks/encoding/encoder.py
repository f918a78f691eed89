"""Latents of all images: found in the scratch folder, or decoded and encoded in threads or on a Ray cluster."""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from models.device import best_device, devices_of, enter, memory_of, placed, warn_of_emulation
from models.networks.autoencoder import Autoencoder, images_at_once, load_autoencoder
from tasks.encoding.blocks import Blocks
from tasks.encoding.rows import Missing, buckets_in, digests_in
from tasks.encoding.transform import BATCH, Chunk, Encoded, decode_chunk, encode_pixels
from tasks.pictures.images import read_encoded
from tasks.runtime import closure, cluster, workspace
from tasks.runtime.progress import progress

if TYPE_CHECKING:
    from tasks.encoding.rows import Rows
    from tasks.formats.buckets import Resolution
    from tasks.formats.codec_info import CodecInfo
    from tasks.params import EncodeParams

CHUNK = 4 * BATCH
"""Images per unit of work."""
CEILING_CHUNKS = 2
"""Chunks per worker over which decoding alone and encoding alone are timed."""
QUEUED_FOR_GPU = 3
"""Chunks handed to each GPU's thread at a time: one in work, the others ready."""

In = TypeVar("In")
Out = TypeVar("Out")


def encode_images(
    images: Path,
    folder: Path,
    codec: CodecInfo,
    resolutions: Sequence[Resolution],
    splits: Mapping[str, Rows],
    params: EncodeParams,
) -> Blocks | None:
    """Encode the images that have no stored latent yet; returns the latents of all, or None for the identity codec.

    Prints which part of the codec or of the transform changed if stored latents are no longer valid.
    """
    if codec.autoencoder is None:
        return None
    recipe = {
        "size of the images": [codec.channels, codec.size],
        "autoencoder": codec.autoencoder.sha256,
        "buckets": [list(resolution) for resolution in resolutions],
        "mirrored copies": params.horizontal_flip,
        "code of the transform": closure.digest("tasks/formats/buckets.py", "tasks/encoding/transform.py"),
        **({} if params.precision == "no" else {"precision": params.precision}),
    }
    blocks = Blocks(workspace.scratch() / "encode" / "images", recipe)
    wanted, first = np.unique(digests_in(splits, "sha256"), return_index=True)
    if changed := blocks.changes():
        print(f"encode: changed since the last time: {', '.join(changed)}; all images are encoded anew", flush=True)
    blocks.open()
    new = ~blocks.known(wanted)
    missing = Missing(wanted[new], buckets_in(splits)[first[new]], resolutions)  # equal files share a bucket
    print(f"encode: {len(missing)} images to encode, {len(wanted) - len(missing)} known", flush=True)
    if missing:
        encode = _encode_on_cluster if params.distributor == "ray" else _encode_missing
        encode(images, folder / "vae", codec.channels, missing, blocks, params)
    blocks.forget(wanted)
    return blocks


def _encode_missing(
    images: Path, vae: Path, channels: int, missing: Missing, blocks: Blocks, params: EncodeParams
) -> None:
    """Decode and encode in threads (both release the GIL); each chunk is stored as soon as it is done."""
    device = best_device()
    warn_of_emulation("encode.precision", params.precision, device)
    network = load_autoencoder(vae, device)
    workers, threads = params.worker_count, torch.get_num_threads()
    # One arithmetic thread per worker, so that sums are divided in the same way on every machine.
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        encoder = Encoder(pool, workers, network, channels, params.horizontal_flip, device, params.precision)
        sample: list[Chunk] = []
        sample_size = CEILING_CHUNKS * workers
        started, started_cpu = time.perf_counter(), time.process_time()
        with progress(total=len(missing), desc="encode", unit="img") as bar:
            for chunk, tensors in encoder.encoded(_chunks(images, missing, encoder.chunk_size)):
                blocks.add([sha256 for sha256, _, _ in chunk.images], tensors)
                bar.update(len(chunk))
                if len(sample) < sample_size and len(chunk) == encoder.chunk_size(chunk.resolution):
                    sample.append(chunk)
        rate = len(missing) / (time.perf_counter() - started)
        cpu_seconds = (time.process_time() - started_cpu) / len(missing)
        if len(sample) == sample_size:
            _print_ceilings(encoder, sample, rate, cpu_seconds)
    torch.set_num_threads(threads)


def _encode_on_cluster(
    images: Path, vae: Path, channels: int, missing: Missing, blocks: Blocks, params: EncodeParams
) -> None:
    """Decode and encode in the processes of a Ray cluster; each chunk is stored as soon as it arrives."""
    with (
        cluster.joined(params.ray_address, params.worker_count, "encode") as ray,
        progress(total=len(missing), desc="encode", unit="img") as bar,
    ):
        allotment = cluster.allotted(ray, params.worker_count)
        workers = cluster.Actors(ray, allotment, _on_worker, load_autoencoder(vae), allotment.cpus)
        at_once = functools.cache(lambda resolution: _least(workers.each(_at_once_of, resolution)))
        work = functools.partial(
            _encode_chunk, channels=channels, mirrored=params.horizontal_flip, precision=params.precision
        )
        chunks = _chunks(images, missing, lambda resolution: max(CHUNK, at_once(resolution) or 0))
        chunks_with_size = ((chunk, at_once(chunk.resolution)) for chunk in chunks)
        for keys, tensors in _in_order(workers, work, chunks_with_size, QUEUED_FOR_GPU * workers.count):
            blocks.add(keys, tensors)
            bar.update(len(keys))


@dataclass(frozen=True)
class _Worker:
    """A process of the cluster that encodes."""

    network: Autoencoder
    device: str
    pool: ThreadPoolExecutor
    """Threads that decode."""
    busy: threading.Lock
    """Of the device: one batch at a time is on it, while the next one is decoded."""


def _on_worker(network: Autoencoder, threads: int) -> _Worker:
    device = best_device()
    return _Worker(network.to(device), device, ThreadPoolExecutor(threads), threading.Lock())


def _at_once_of(worker: _Worker, resolution: Resolution) -> int | None:
    """Return the size of a batch on the worker's device, see `Encoder.at_once`."""
    return _images_at_once(worker.network, worker.device, resolution)


def _least(sizes: Sequence[int | None]) -> int | None:
    """Return the size of a batch that every worker has the memory for, so that all compute alike; None on CPUs."""
    return min((size for size in sizes if size is not None), default=None)


def _encode_chunk(
    worker: _Worker, chunk_and_size: tuple[Chunk, int | None], channels: int, mirrored: bool, precision: str
) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Return the SHA-256 of the images of a chunk, and their latents, encoded in batches of the given size."""
    chunk, at_once = chunk_and_size
    torch.set_num_threads(1)  # as in `_encode_missing`, so that sums are divided in the same way
    parts = [Chunk(chunk.resolution, [image]) for image in chunk.images]
    pixels = np.concatenate(list(worker.pool.map(functools.partial(decode_chunk, channels=channels), parts)))
    with worker.busy:
        encoded = encode_pixels(worker.network, pixels, mirrored, precision, at_once)
    return [sha256 for sha256, _, _ in chunk.images], encoded


def _images_at_once(network: Autoencoder, device: str, resolution: Resolution) -> int | None:
    """Return the size of a batch on a GPU by its memory; None on a CPU, see `transform.encode_pixels`."""
    return None if device == "cpu" else images_at_once(network, resolution[0] * resolution[1], memory_of(device))


@dataclass(frozen=True)
class Encoder:
    """An autoencoder and the `workers` threads of `pool` that feed it."""

    pool: ThreadPoolExecutor
    workers: int
    network: Autoencoder
    channels: int
    mirrored: bool
    device: str
    precision: str = "no"

    def encoded(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, dict[str, torch.Tensor]]]:
        """Yield the chunks with their latents, in order.

        On a CPU each worker decodes and encodes, so that no core waits for another. With GPUs the workers only decode,
        and one more thread per GPU keeps it busy.
        """
        if self.device == "cpu":
            work = functools.partial(self._encode, self.network)
            yield from _in_order(self.pool, lambda chunk: work(self._decode(chunk)), chunks, 2 * self.workers)
            return
        names: SimpleQueue[str] = SimpleQueue()
        for name in (gpus := devices_of(self.device)):
            names.put(name)
        own = threading.local()

        def encode(decoded: tuple[Chunk, np.ndarray]) -> tuple[Chunk, dict[str, torch.Tensor]]:
            if not hasattr(own, "name"):  # the first chunk of this thread, which takes one of the GPUs
                own.name = names.get()
                enter(own.name)
            if not hasattr(own, "network"):
                own.network = placed(self.network, own.name)
            return self._encode(own.network, decoded)

        decoded = _in_order(self.pool, self._decode, chunks, 2 * self.workers)
        with ThreadPoolExecutor(len(gpus), thread_name_prefix="device") as feeders:
            yield from _in_order(feeders, encode, decoded, QUEUED_FOR_GPU * len(gpus))

    def at_once(self, resolution: Resolution) -> int | None:
        """Return the size of a batch, see `_images_at_once`."""
        return _images_at_once(self.network, self.device, resolution)

    def chunk_size(self, resolution: Resolution) -> int:
        """Return the number of images per unit of work: `CHUNK`, or a batch where that is larger."""
        return max(CHUNK, self.at_once(resolution) or 0)

    def _decode(self, chunk: Chunk) -> tuple[Chunk, np.ndarray]:
        return chunk, decode_chunk(chunk, self.channels)

    def _encode(self, network: Autoencoder, decoded: tuple[Chunk, np.ndarray]) -> tuple[Chunk, dict[str, torch.Tensor]]:
        chunk, pixels = decoded
        at_once = self.at_once(chunk.resolution)
        return chunk, encode_pixels(network, pixels, self.mirrored, self.precision, at_once)

    def ceilings(self, sample: Sequence[Chunk]) -> tuple[float, float]:
        """Measure the images per second of decoding alone and of encoding alone; several GPUs are taken to be equal."""
        started = time.perf_counter()
        decoded = list(self.pool.map(self._decode, sample))
        between = time.perf_counter()
        encode = functools.partial(self._encode, self.network)
        list(self.pool.map(encode, decoded) if self.device == "cpu" else map(encode, decoded))
        ended = time.perf_counter()
        count = sum(map(len, sample))
        return count / (between - started), len(devices_of(self.device)) * count / (ended - between)


def _chunks(images: Path, missing: Missing, chunk_size: Callable[[Resolution], int]) -> Iterator[Chunk]:
    """Read the missing images, which are named by their SHA-256, grouped by resolution."""
    begun: dict[Resolution, list[Encoded]] = {}
    for image in read_encoded(images, missing.names):
        resolution = missing.resolution(image[0])
        group = begun.setdefault(resolution, [])
        group.append(image)
        if len(group) == chunk_size(resolution):
            yield Chunk(resolution, begun.pop(resolution))
    for resolution, group in sorted(begun.items()):
        yield Chunk(resolution, group)


def _in_order(pool: Executor, work: Callable[..., Out], items: Iterable[In], ahead: int) -> Iterator[Out]:
    """Yield `work(item)` in the order of the items, with at most `ahead` of them in memory."""
    waiting: deque[Future[Out]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()


def _print_ceilings(encoder: Encoder, sample: Sequence[Chunk], rate: float, cpu_seconds: float) -> None:
    """Print the measured rate beside the rate that decoding and encoding allow.

    Args:
        encoder: measures the two.
        sample: chunks to measure them on.
        rate: images per second of the whole.
        cpu_seconds: CPU time per image; unlike the rate it does not depend on other processes of the machine.
    """
    started = time.process_time()
    decode, encode = encoder.ceilings(sample)
    needed = (time.process_time() - started) / sum(map(len, sample))
    # On a CPU both share the cores; with a GPU the slower of the two limits the rate.
    allowed = 1 / (1 / decode + 1 / encode) if encoder.device == "cpu" else min(decode, encode)
    print(
        f"encode: {rate:,.0f} img/s; decoding alone {decode:,.0f}, the encoder alone {encode:,.0f} img/s: "
        f"{rate / allowed:.0%} of what the two allow ({needed / cpu_seconds:.0%} by CPU time)"
    )
