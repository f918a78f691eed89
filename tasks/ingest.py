"""The stage `ingest`: whatever the source, one normal form; what cannot be read is set aside with a reason."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tasks import atomic, cifar, decoding, digits, folder, hub_tables, stage
from tasks import quarantine as apart
from tasks.images import Writer, split_of
from tasks.params import IngestParams
from tasks.source import Entry, Problem, Source, read_manifest
from tasks.stage import StageError

CHUNK_ENTRIES = 256
CHUNK_BYTES = 16 << 20


def ingest(raw: Path, images: Path, quarantine: Path, params: IngestParams) -> None:
    """Turn the source in data/raw into Parquet shards of one form; set aside what cannot be read, with the reason."""
    manifest = read_manifest(raw)
    source = _open(manifest, {file["name"]: raw / file["name"] for file in manifest["files"]}, params)
    with atomic.writing_folder(images) as rows, atomic.writing_folder(quarantine) as aside:
        writer, quarantined = Writer(rows, params.shards), apart.Writer(aside)
        progress = tqdm(total=source.count, desc="ingest", unit="img", mininterval=1, dynamic_ncols=True)
        for entry, finding in _examined(source.entries, params):
            if isinstance(finding, Problem):
                quarantined.add(entry, finding)
            else:
                writer.add(finding | _published(entry, source, params) | _origin(manifest))
            progress.update()
        progress.close()
        reasons = quarantined.close()
        counts = {"inputs": writer.rows + sum(reasons.values()), "quarantined": reasons}
        if not writer.rows:
            raise StageError(_nothing_readable(manifest, reasons))
        index = writer.close() | counts | _origin(manifest)
        index |= {"classes": source.classes, "unmatched_captions": source.unmatched_captions}
        atomic.write_json(rows / "index.json", index)
        atomic.write_json(aside / "index.json", counts | {"rows": writer.rows})
    print(f"ingest: {index['rows']} images {index['splits']}, {sum(reasons.values())} in quarantine {reasons or ''}")
    if source.unmatched_captions:
        print(f"ingest: {source.unmatched_captions} captions name no image")


def _open(manifest: dict[str, Any], files: dict[str, Path], params: IngestParams) -> Source:
    first = next(iter(files.values()))
    match manifest["source"]:
        case "digits":
            return digits.read(first)
        case "cifar10":
            return cifar.read(first)
        case "folder":
            return folder.read(first, params.max_image_bytes)
        case "hub":
            return hub_tables.read(files, manifest["details"], params.max_image_bytes)
    raise StageError(f"data/raw comes from the unknown source '{manifest['source']}'; run 'dvc repro -f download'")


def _nothing_readable(manifest: dict[str, Any], reasons: dict[str, int]) -> str:
    found = ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
    return f"{manifest['origin']} holds no readable image ({found or 'it is empty'}); point download.path at images"


def _origin(manifest: dict[str, Any]) -> dict[str, str]:
    return {"licence": manifest["licence"], "source": manifest["source"]}


def _published(entry: Entry, source: Source, params: IngestParams) -> dict[str, Any]:
    """What the source says about an entry, completed: the split by key hash, the captions from the class name."""
    captions = list(entry.captions)
    if not captions and entry.label is not None:
        name = source.classes[entry.label].replace("_", " ")
        captions = [template.format(name) for template in params.caption_templates]
    split = entry.split or split_of(entry.key, params.held_out_fraction)
    return {"key": entry.key, "label": entry.label, "captions": captions, "split": split, "safety": entry.safety}


def _examined(entries: Iterator[Entry], params: IngestParams) -> Iterator[tuple[Entry, dict[str, Any] | Problem]]:
    """Every entry with what its bytes show, in the order given; decoded by `params.workers` threads.

    Decoding and hashing leave Python's lock, so threads share the cores, and no process outlives
    the stage. At most two chunks per worker are in memory.
    """
    waiting: deque[tuple[list[Entry], Future[list[dict[str, Any] | Problem]]]] = deque()
    with ThreadPoolExecutor(params.workers) as pool:
        for chunk in _chunks(entries):
            waiting.append((chunk, pool.submit(_examine, chunk, params)))
            if len(waiting) >= 2 * params.workers:
                done, future = waiting.popleft()
                yield from zip(done, future.result(), strict=True)
        for done, future in waiting:
            yield from zip(done, future.result(), strict=True)


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


def _examine(chunk: list[Entry], params: IngestParams) -> list[dict[str, Any] | Problem]:
    """The columns that follow from the bytes of each entry, or why there are none."""
    import numpy as np

    findings: list[dict[str, Any] | Problem] = []
    thumbnails = []
    for entry in chunk:
        finding = _decode(entry, params)
        if isinstance(finding, Problem):
            findings.append(finding)
            continue
        row, thumbnail = finding
        findings.append(row)
        thumbnails.append(thumbnail)
    hashes = iter(decoding.perceptual_hashes(np.stack(thumbnails)) if thumbnails else [])
    for found in findings:
        if not isinstance(found, Problem):
            found["phash"] = next(hashes)
    return findings


def _decode(entry: Entry, params: IngestParams) -> tuple[dict[str, Any], Any] | Problem:
    if entry.problem or entry.data is None:
        return entry.problem or Problem("not read", "the source gave no bytes")
    try:
        picture = decoding.open_image(entry.data, params.max_pixels)
        thumbnail = decoding.thumbnail(picture)
    except decoding.UnreadableError as unreadable:
        return Problem(unreadable.reason, unreadable.detail)
    row = {
        "image": entry.data,
        "width": picture.width,
        "height": picture.height,
        "mode": picture.mode,
        "sha256": hashlib.sha256(entry.data).hexdigest(),
    }
    return row, thumbnail


if __name__ == "__main__":
    stage.main(ingest)
