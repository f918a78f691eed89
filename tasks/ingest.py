"""The stage `ingest`: whatever the source, one normal form; what cannot be read is set aside with a reason."""

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
from pathlib import Path
from typing import Any, TypeAlias

from tqdm import tqdm

from tasks.params import IngestParams
from tasks.pictures import colours, decoding
from tasks.pictures.images import Writer, split_of
from tasks.runtime import atomic, integrity, parent, stage
from tasks.runtime.stage import StageError
from tasks.sources import cifar, digits, folder, picture_tables
from tasks.sources import quarantine as apart
from tasks.sources.entry import Entry, Problem, Source, read_manifest
from tasks.validation.writing_systems import is_control

CHUNK_ENTRIES = 256
CHUNK_BYTES = 16 << 20
CEILING_CHUNKS = 16
"""Chunks that are decoded a second time, to say what the stage could reach at best; of a smaller source, none."""

Finding: TypeAlias = "dict[str, Any] | Problem"
"""The columns that follow from the bytes of a picture, or why there are none."""


def ingest(raw: Path, images: Path, quarantine: Path, params: IngestParams) -> None:
    """Turn the source in data/raw into Parquet shards of one form; set aside what cannot be read, with the reason.

    Captions of the source `folder`: a table of file names and captions (CSV, TSV, JSON lines, JSON of COCO or kohya),
    or a text file of the same name beside each image, or in a folder `captions` beside the images. Each line of a
    text file is a caption of its own; write a caption that goes over several lines as one line, or into a .json file
    as {"caption": "..."}. What looks like captions and is not read is counted, and named in the output.
    """
    started = time.perf_counter()
    manifest = read_manifest(raw)
    integrity.require(raw, {file["name"]: file["sha256"] for file in manifest["files"]}, "download")
    source = _open(manifest, {file["name"]: raw / file["name"] for file in manifest["files"]}, params)
    origin, captions = _origin(manifest), _class_captions(source.classes, params)
    with (
        atomic.writing_folder(images) as rows,
        atomic.writing_folder(quarantine) as aside,
        _decoders(params) as pool,
        _no_search_for_cycles(),
    ):
        writer, quarantined = Writer(rows, params.shards, source.classes), apart.Writer(aside)
        progress = tqdm(total=source.count, desc="ingest", unit="img", mininterval=1, dynamic_ncols=True)
        sample: list[list[bytes]] = []
        first_profiled: dict[str, str] = {}
        profiles: Counter[str] = Counter()
        for entry, finding in _examined(source.entries, len(source.classes), pool, params, sample):
            if isinstance(finding, Problem):
                quarantined.add(entry, finding)
            else:
                profiles[finding["profile"]] += 1
                first_profiled.setdefault(finding["profile"], entry.key)
                writer.add({**finding, **_published(entry, captions, params), **origin})
            progress.update()
        progress.close()
        reasons = quarantined.close()
        inputs = writer.rows + sum(reasons.values())
        counts = {"inputs": inputs, "quarantined": reasons}
        if not writer.rows:
            raise StageError(_nothing_readable(manifest, reasons))
        index = writer.close() | counts | origin
        index |= {"classes": source.classes, "unmatched_captions": source.unmatched_captions}
        index["caption_files"] = source.caption_files
        index["profiles"] = {name: profiles[name] for name in ("converted", "not usable")}
        atomic.write_json(rows / "index.json", index)
        atomic.write_json(aside / "index.json", counts | {"rows": writer.rows})
        speed = _speed(inputs, time.perf_counter() - started, pool, sample, params)
    print(f"ingest: {index['rows']} images {index['splits']}, {sum(reasons.values())} in quarantine")
    notes = map(apart.shown, source.notes)
    for sentence in [*quarantined.told(), *colours.sentences(index["profiles"], first_profiled), *notes]:
        print(f"ingest: {sentence}")
    if speed:
        print(speed)


def _open(manifest: dict[str, Any], files: dict[str, Path], params: IngestParams) -> Source:
    first = next(iter(files.values()))
    match manifest["source"]:
        case "digits":
            return digits.read(first)
        case "cifar10":
            return cifar.read(first)
        case "folder":
            return folder.read(first, params.max_image_bytes)
        case "hub" | "laion":
            tables = {name: file for name, file in files.items() if file.suffix == ".parquet"}
            return picture_tables.read(tables, manifest["details"]["columns"], params.max_image_bytes)
    raise StageError(f"data/raw comes from the unknown source '{manifest['source']}'; run 'dvc repro -f download'")


def _nothing_readable(manifest: dict[str, Any], reasons: dict[str, int]) -> str:
    found = ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
    return f"{manifest['origin']} holds no readable image ({found or 'it is empty'}); point download.path at images"


def _origin(manifest: dict[str, Any]) -> dict[str, str]:
    return {"licence": manifest["licence"], "source": manifest["source"]}


def _class_captions(classes: list[str], params: IngestParams) -> list[list[str]]:
    """For each class the captions that its name gives."""
    names = [name.replace("_", " ") for name in classes]
    return [[template.format(name) for template in params.caption_templates] for name in names]


def _published(entry: Entry, captions: list[list[str]], params: IngestParams) -> dict[str, Any]:
    """What the source says about an entry, completed: the split by key hash, the captions from the class name."""
    own = list(entry.captions) or (captions[entry.label] if entry.label is not None else [])
    split = entry.split or split_of(entry.key, params.held_out_fraction)
    return {"key": entry.key, "label": entry.label, "captions": own, "split": split, "safety": entry.safety}


@contextmanager
def _decoders(params: IngestParams) -> Iterator[ProcessPoolExecutor]:
    """`params.workers` processes that decode: of a small picture's time most is Python's own, under its lock.

    They are forked where that is safe, which costs nothing, and end with the stage, however that ends.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(params.workers, context, _begin_decoder)
    try:
        yield pool
    except BrokenProcessPool:
        raise StageError(
            "a process that decodes pictures was killed, as a machine without memory does; lower ingest.workers or "
            "ingest.max_pixels"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _no_search_for_cycles() -> Iterator[None]:
    """Rows hold no cycles, and looking for some among hundreds of thousands takes a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _begin_decoder() -> None:
    """In a new process: the stage hears the signals and ends it; should the stage be killed, it goes too."""
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
    """Every entry with what its bytes show, in the order given. At most three chunks per worker are in memory.

    The bytes of the first chunks stay in `sample`.
    """
    waiting: deque[tuple[list[Entry], list[Problem | None], Future[list[Finding]]]] = deque()
    for chunk in _chunks(entries):
        problems = [_problem(entry, classes) for entry in chunk]
        data = [entry.data for entry, problem in zip(chunk, problems, strict=True) if entry.data and not problem]
        if len(sample) < CEILING_CHUNKS:
            sample.append(data)
        waiting.append((chunk, problems, pool.submit(_examine, data, params.max_pixels)))
        if len(waiting) >= 3 * params.workers:
            yield from _joined(*waiting.popleft())
    while waiting:
        yield from _joined(*waiting.popleft())


def _joined(
    chunk: list[Entry], problems: list[Problem | None], future: Future[list[Finding]]
) -> Iterator[tuple[Entry, Finding]]:
    findings = iter(future.result())
    for entry, problem in zip(chunk, problems, strict=True):
        finding = problem or next(findings)
        yield entry, finding if isinstance(finding, Problem) else {**finding, "image": entry.data}


def _problem(entry: Entry, classes: int) -> Problem | None:
    """What is wrong with an entry before its picture is opened."""
    if entry.problem:
        return entry.problem
    if entry.data is None:
        return Problem("not read", "the source gave no bytes")
    if not entry.data:
        return Problem("zero bytes", "the file is empty")
    if entry.label is not None and not (isinstance(entry.label, int) and 0 <= entry.label < classes):
        return Problem("label out of range", f"the label {entry.label} names none of the {classes} classes")
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


def _examine(pictures: list[bytes], max_pixels: int) -> list[Finding]:
    """Encoded pictures -> what their bytes show."""
    import numpy as np

    findings: list[Finding] = []
    thumbnails = []
    for data in pictures:
        try:
            picture = decoding.open_image(data, max_pixels)
            thumbnails.append(decoding.thumbnail(picture))
        except decoding.UnreadableError as unreadable:
            findings.append(Problem(unreadable.reason, unreadable.detail))
            continue
        digest = hashlib.sha256(data).hexdigest()
        height, width = decoding.upright_size(picture)
        profile = colours.profile(picture)
        findings.append({"width": width, "height": height, "mode": picture.mode, "sha256": digest, "profile": profile})
    hashes = iter(decoding.perceptual_hashes(np.stack(thumbnails)) if thumbnails else [])
    for found in findings:
        if not isinstance(found, Problem):
            found["phash"] = next(hashes)
    return findings


def _speed(
    count: int, seconds: float, pool: ProcessPoolExecutor, sample: list[list[bytes]], params: IngestParams
) -> str | None:
    """How fast the stage was beside its ceiling: all workers decoding and hashing, and nothing else going on."""
    if len(sample) < CEILING_CHUNKS:
        return None
    spent = sum(pool.map(_seconds_of, sample, [params.max_pixels] * len(sample)))
    ceiling = params.workers * sum(map(len, sample)) / spent
    return (
        f"ingest: {count / seconds:,.0f} img/s, {count / seconds / ceiling:.0%} of the ceiling of {ceiling:,.0f} img/s "
        f"({params.workers} workers that only decode and hash)"
    )


def _seconds_of(pictures: list[bytes], max_pixels: int) -> float:
    started = time.perf_counter()
    _examine(pictures, max_pixels)
    return time.perf_counter() - started


if __name__ == "__main__":
    stage.main(ingest)
