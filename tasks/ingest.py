"""The stage `ingest`: any source -> the dataset format; inputs that cannot be read go to quarantine with a reason."""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tasks.params import IngestParams
from tasks.runtime import atomic, integrity, parent, stage
from tasks.runtime.errors import StageError
from tasks.runtime.progress import progress
from tasks.sources.entry import Entry, Manifest, Problem, Source, read_manifest

if TYPE_CHECKING:
    from tasks.pictures.images import ImageRow, MapWriter

CHUNK_ENTRIES = 256
CHUNK_BYTES = 16 << 20
CEILING_CHUNKS = 16
"""Chunks that are decoded twice to measure the decoding speed; smaller sources are not measured."""


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


def ingest(raw: Path, images: Path, quarantine: Path, params: IngestParams) -> None:
    """Convert the source in data/raw to Parquet shards; inputs that cannot be read go to quarantine with the reason.

    Captions of the source `folder`: a caption file (CSV, TSV, JSON lines, or JSON in the formats of COCO or kohya) with
    file names and captions, or a text file with the name of an image, beside it or in a folder `captions`. Each line
    of a text file is a separate caption; write a caption that goes over several lines as one line, or into a .json file
    as {"caption": "..."}. Files and lines that look like captions and cannot be read go to quarantine. Lines of a
    caption file that name no image only cause a warning, because a complete caption file beside a subset of the images
    is common; they do not count towards validate.max_quarantined_fraction.
    """
    from tasks.formats import quarantine as quarantines
    from tasks.pictures import colours
    from tasks.pictures.images import MapWriter, Writer
    from tasks.pictures.index import FILE

    started = time.perf_counter()
    manifest = read_manifest(raw)
    integrity.require(raw, {file.name: file.sha256 for file in manifest.files}, "download")
    source = _open(manifest, {file.name: raw / file.name for file in manifest.files}, params)
    captions = _class_captions(source.classes, params)
    with (
        atomic.writing_folder(images) as image_folder,
        atomic.writing_folder(quarantine) as quarantine_folder,
        _decoders(params) as pool,
        _without_garbage_collection(),
    ):
        writer, maps = Writer(image_folder, params.shards, source.classes), MapWriter(image_folder)
        quarantined = quarantines.Writer(quarantine_folder)
        bar = progress(desc="ingest", total=source.count, unit="img")
        sample: list[list[bytes]] = []
        first_profiled: dict[str, str] = {}
        profiles: Counter[str] = Counter()
        for entry, finding in _examined(_images(source.entries, maps), len(source.classes), pool, params, sample):
            if isinstance(finding, Problem):
                quarantined.add(entry, finding)
            else:
                profiles[finding.profile] += 1
                first_profiled.setdefault(finding.profile, entry.key)
                writer.add(_row(entry, finding, captions, manifest, params))
            bar.update()
        bar.close()
        reasons = quarantined.close()
        if not writer.rows:
            raise StageError(_nothing_readable(manifest, reasons))
        index = replace(
            maps.close(writer.close()),
            inputs=writer.rows + sum(reasons.values()),
            quarantined=reasons,
            licence=manifest.licence,
            source=manifest.source,
            unmatched_captions=source.unmatched_captions,
            caption_files=source.caption_files,
            profiles={name: profiles[name] for name in ("converted", "not usable")},
        )
        index.write(image_folder / FILE)
        quarantines.QuarantineIndex(index.inputs, index.rows, reasons).write(quarantine_folder / quarantines.INDEX)
        speed = _speed(index.inputs, time.perf_counter() - started, pool, sample, params)
    print(f"ingest: {index.rows} images {index.splits}, {sum(reasons.values())} in quarantine")
    if maps.count:
        print(f"ingest: {maps.count} control maps, for encode.control.kind 'own'")
    notes = map(quarantines.printable, source.notes)
    for sentence in [*quarantined.summary(), *colours.sentences(index.profiles, first_profiled), *notes]:
        print(f"ingest: {sentence}")
    if speed:
        print(speed)


def _images(entries: Iterator[Entry], maps: MapWriter) -> Iterator[Entry]:
    """Yield the entries of images; those of control maps go to `maps`."""
    for entry in entries:
        if entry.map_of is None:
            yield entry
        elif entry.data is not None:
            maps.add(entry.map_of, entry.data)


def _open(manifest: Manifest, files: dict[str, Path], params: IngestParams) -> Source:
    first = next(iter(files.values()))
    match manifest.source:
        case "digits":
            from tasks.sources import digits

            return digits.read(first)
        case "cifar10":
            from tasks.sources import cifar

            return cifar.read(first)
        case "folder":
            from tasks.sources import folder

            return folder.read(first, params.max_image_bytes)
        case "hub" | "laion":
            from tasks.sources import picture_tables

            tables = {name: file for name, file in files.items() if file.suffix == ".parquet"}
            return picture_tables.read(tables, manifest.columns, params.max_image_bytes)
    raise StageError(f"data/raw comes from the unknown source '{manifest.source}'; {Manifest.REMEDY}")


def _nothing_readable(manifest: Manifest, reasons: dict[str, int]) -> str:
    found = ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
    return f"{manifest.origin} holds no readable image ({found or 'it is empty'}); correct download.path"


def _class_captions(classes: list[str], params: IngestParams) -> list[list[str]]:
    """Captions of each class from `ingest.caption_templates`."""
    names = [name.replace("_", " ") for name in classes]
    return [[template.format(name) for template in params.caption_templates] for name in names]


def _row(
    entry: Entry, decoded: Decoded, captions: list[list[str]], manifest: Manifest, params: IngestParams
) -> ImageRow:
    """A row of the dataset; the split defaults to the key hash, the captions to those of the class."""
    from tasks.pictures.images import split_of

    assert entry.data is not None
    return {
        "key": entry.key,
        "image": entry.data,
        "width": decoded.width,
        "height": decoded.height,
        "mode": decoded.mode,
        "label": entry.label,
        "captions": list(entry.captions) or (captions[entry.label] if entry.label is not None else []),
        "split": entry.split or split_of(entry.key, params.held_out_fraction),
        "sha256": decoded.sha256,
        "phash": decoded.phash,
        "safety": entry.safety,
        "licence": manifest.licence,
        "source": manifest.source,
    }


@contextmanager
def _decoders(params: IngestParams) -> Iterator[ProcessPoolExecutor]:
    """A pool of `ingest.workers` decoding processes: small images mostly need Python time, which threads cannot share.

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


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Disable the cyclic garbage collector: rows have no reference cycles, and searching them takes 20% of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _begin_decoder() -> None:
    """Initialise a decoding process: the stage handles signals, and Linux kills the process if the stage dies."""
    gc.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent.end_with_parent(signal.SIGKILL)


def _examined(
    entries: Iterator[Entry],
    classes: int,
    pool: ProcessPoolExecutor,
    params: IngestParams,
    sample: list[list[bytes]],
) -> Iterator[tuple[Entry, Finding]]:
    """Yield every entry with its finding, in order; at most three chunks per worker are in memory.

    The bytes of the first chunks are added to `sample`.
    """
    waiting: deque[tuple[list[Entry], list[Problem | None], Future[list[Finding]]]] = deque()
    for chunk in _chunks(entries):
        problems = [_problem(entry, classes) for entry in chunk]
        data = [entry.data for entry, problem in zip(chunk, problems, strict=True) if entry.data and not problem]
        if len(sample) < CEILING_CHUNKS:
            sample.append(data)
        waiting.append((chunk, problems, pool.submit(_examine, data, params.max_pixels)))
        if len(waiting) >= 3 * params.worker_count:
            yield from _joined(*waiting.popleft())
    while waiting:
        yield from _joined(*waiting.popleft())


def _joined(
    chunk: list[Entry], problems: list[Problem | None], future: Future[list[Finding]]
) -> Iterator[tuple[Entry, Finding]]:
    findings = iter(future.result())
    for entry, problem in zip(chunk, problems, strict=True):
        yield entry, problem or next(findings)


def _problem(entry: Entry, classes: int) -> Problem | None:
    """Problem of an entry that is known before the image is decoded."""
    from tasks.validation.writing_systems import is_control

    if entry.problem:
        return entry.problem
    if entry.data is None:
        return Problem("not read", "the source provides no bytes")
    if not entry.data:
        return Problem("zero bytes", "the file is empty")
    if entry.label is not None and not (isinstance(entry.label, int) and 0 <= entry.label < classes):
        return Problem("label out of range", f"the label {entry.label} is none of the {classes} classes")
    for text in entry.captions:
        if not text.isprintable() and any(map(is_control, text)):
            return Problem("control characters in a caption", ascii(text)[:200])
    return None


def _chunks(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    chunk: list[Entry] = []
    size = 0
    for entry in entries:
        chunk.append(entry)
        size += len(entry.data or b"")
        if len(chunk) >= CHUNK_ENTRIES or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _examine(images: list[bytes], max_pixels: int) -> list[Finding]:
    """Decode images -> their metadata or problems."""
    import numpy as np

    from tasks.pictures import colours, decoding

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


def _speed(
    count: int, seconds: float, pool: ProcessPoolExecutor, sample: list[list[bytes]], params: IngestParams
) -> str | None:
    """Message about the speed of the stage, relative to workers that only decode and hash; None for small sources."""
    if len(sample) < CEILING_CHUNKS:
        return None
    spent = sum(pool.map(_seconds_of, sample, [params.max_pixels] * len(sample)))
    ceiling = params.worker_count * sum(map(len, sample)) / spent
    return (
        f"ingest: {count / seconds:,.0f} img/s, {count / seconds / ceiling:.0%} of the ceiling of {ceiling:,.0f} img/s "
        f"({params.worker_count} workers that only decode and hash)"
    )


def _seconds_of(images: list[bytes], max_pixels: int) -> float:
    started = time.perf_counter()
    _examine(images, max_pixels)
    return time.perf_counter() - started


if __name__ == "__main__":
    stage.main(ingest)
