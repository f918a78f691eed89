"""Encoded images -> the columns of the dataset that follow from their bytes, computed by a pool of processes."""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from tasks.pictures import colours, decoding
from tasks.runtime import cluster, parent
from tasks.runtime.errors import StageError
from tasks.sources.entry import Problem

if TYPE_CHECKING:
    from tasks.params import IngestParams


@dataclass(frozen=True, slots=True)
class Decoded:
    """Columns of the dataset that follow from the bytes of an image."""

    width: int
    height: int
    mode: str
    sha256: str
    phash: str
    profile: str
    """How the colour profile is handled, see `colours.Profile`."""


Finding: TypeAlias = "Decoded | Problem"


@contextmanager
def decoders(params: IngestParams) -> Iterator[Executor]:
    """A pool of `ingest.workers` processes: small images mostly need Python time, which threads cannot share.

    They run on this machine or on a Ray cluster, as `params.distributor` says.
    """
    if params.distributor == "ray":
        with cluster.joined(params.ray_address, params.worker_count, "ingest") as ray:
            yield cluster.Tasks(ray)
        return
    with _processes(params) as pool:
        yield pool


@contextmanager
def _processes(params: IngestParams) -> Iterator[Executor]:
    """Decoding processes on this machine.

    The processes are forked if that is safe (Linux), and end with the stage even if that is killed.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(params.worker_count, context, _begin_decoder)
    try:
        yield pool
    except BrokenProcessPool:
        raise StageError(
            "a decoding process was killed, probably for lack of memory; lower ingest.workers or ingest.max_pixels"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_decoder() -> None:
    """Initialise a decoding process: the stage handles signals, and Linux kills the process if the stage dies."""
    gc.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent.end_with_parent(signal.SIGKILL)


def examine(images: list[bytes], max_pixels: int) -> list[Finding]:
    """Decode images -> their metadata or problems."""
    findings: list[Finding] = []
    thumbnails = []
    for data in images:
        try:
            image = decoding.open_image(data, max_pixels)
            thumbnails.append(decoding.thumbnail(image))
        except decoding.UnreadableError as unreadable:
            findings.append(Problem(unreadable.reason, unreadable.detail))
            continue
        height, width = decoding.upright_size(image)
        digest = hashlib.sha256(data).hexdigest()
        findings.append(Decoded(width, height, image.mode, digest, "", colours.profile(image)))
    hashes = iter(decoding.perceptual_hashes(np.stack(thumbnails)) if thumbnails else [])
    return [found if isinstance(found, Problem) else replace(found, phash=next(hashes)) for found in findings]


def seconds_of(images: list[bytes], max_pixels: int) -> float:
    """Measure how long `examine` takes."""
    started = time.perf_counter()
    examine(images, max_pixels)
    return time.perf_counter() - started
