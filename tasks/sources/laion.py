"""The source `laion`: tables of addresses and captions -> filtered, downloaded, verified pictures.

C. Schuhmann et al., "LAION-5B: An open large-scale dataset for training next generation image-text models"
(2022); the original is withdrawn, Re-LAION's research-safe release stands in its place.

The columns vary by release, so names are matched in any case and values converted to what is meant. In
`data/raw/` come Parquet tables of the pictures, `outcomes.csv` with a line for each address that was asked for, and the
counts of the filters and of the outcomes in the manifest.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tqdm import tqdm

from tasks.runtime import atomic, workspace
from tasks.runtime.stage import StageError
from tasks.sources import hub
from tasks.sources.entry import sha256_of
from tasks.transfer import crawl

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from tasks.params import DownloadParams, LaionParams

ALIASES = {
    "url": ("url", "image_url"),
    "caption": ("text", "caption", "alt_text", "top_caption"),
    "width": ("width", "original_width"),
    "height": ("height", "original_height"),
    "similarity": ("similarity", "clip_similarity", "clip_similarity_vitb32"),
    "unsafe": ("punsafe",),
    "watermark": ("pwatermark",),
    "language": ("language", "lang"),
    "hash": ("sha256", "md5", "hash"),
}
NUMBERS = ("width", "height", "similarity", "unsafe", "watermark")
NEEDED = {
    "min_side": ("width", "height"),
    "max_aspect_ratio": ("width", "height"),
    "min_similarity": ("similarity",),
    "max_watermark": ("watermark",),
    "max_unsafe": ("unsafe",),
    "languages": ("language",),
}
"""Columns without which a filter cannot work."""
KEPT = ("row", "expected_hash")
"""Columns that go with each address through the download."""
HASHES = {32: "md5", 64: "sha256"}
BATCH_ROWS = 65_536
OUTCOMES = "outcomes.csv"
COLUMNS = {"key": "key", "image": "picture", "captions": ["caption"], "safety": "safety"}
"""How `ingest` reads the tables of pictures."""


def copy(raw: Path, params: DownloadParams) -> tuple[str, dict[str, Any]]:
    """Filter the tables, download what passes and verify it into `raw`; returns the origin and the counts.

    What has arrived stays in the scratch folder until all is done. Raises `StageError` where a filter
    lacks its column, nothing passes, or fewer than `min_success_rate` of the addresses give an image.
    """
    work = workspace.scratch() / "laion"
    with atomic.writing_folder(work / "tables") as tables:
        origin = _tables(tables, params)
    files = sorted((work / "tables").rglob("*.parquet"))
    job = work / _identity(files, params.laion)
    filters = _filter_once(files, job, params.laion)
    kind = filters.pop("hash_kind")
    crawl.download(job / "urls", job / "shards", list(KEPT), kind, params)
    outcomes = _collect(job / "shards", raw, kind, judged=params.laion.max_unsafe is not None)
    asked, succeeded = sum(outcomes.values()), outcomes.get("success", 0)
    if succeeded < params.laion.min_success_rate * asked:
        raise StageError(
            f"{succeeded} of {asked} addresses gave an image ({_said(outcomes)}), fewer than "
            f"download.laion.min_success_rate {params.laion.min_success_rate}; lower it (what has arrived is kept), or "
            "take another table"
        )
    print(f"download: of {asked} addresses {_said(outcomes)}", flush=True)
    shutil.rmtree(work, ignore_errors=True)
    return origin, {"columns": COLUMNS, "filters": filters, "outcomes": outcomes}


def _said(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _tables(target: Path, params: DownloadParams) -> str:
    """Bring the tables of addresses into `target`; returns where they came from."""
    if params.hub.repo is not None:
        return hub.copy(target, params)
    path = Path(params.path)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise StageError(f"download.path {path} is no Parquet table and holds none; correct it")
    for number, file in enumerate(files):
        shutil.copyfile(file, target / f"{number:05d}.parquet")
    return path.resolve().name


def _identity(files: list[Path], laion: LaionParams) -> str:
    """Name of the work on these tables with these filters; how fast it is done is no part of it."""
    parts = laion.model_dump(mode="json", include={*NEEDED, "max_images", "shorter_side", "shard_size", "user_agent"})
    hashes = [sha256_of(file) for file in files]
    return hashlib.sha256(json.dumps([hashes, parts], sort_keys=True).encode()).hexdigest()[:16]


def _filter_once(files: list[Path], job: Path, laion: LaionParams) -> dict[str, Any]:
    """Write the wanted addresses into `job/urls`, unless that was done before; returns the counts of the filters."""
    counted = job / "filters.json"
    if not counted.exists():
        with atomic.writing_folder(job / "urls") as urls:
            counts = select(files, urls, laion)
        atomic.write_json(counted, counts)
    counts = json.loads(counted.read_text(encoding="utf-8"))
    left_out = _said(counts["left_out"]) or "none"
    print(f"download: {counts['kept']} of {counts['read']} rows pass; left out: {left_out}", flush=True)
    return dict(counts)


def select(files: list[Path], urls: Path, laion: LaionParams) -> dict[str, Any]:
    """Tables as published -> tables of at most `laion.max_images` addresses in the folder `urls`, in the same order.

    Columns: url, caption, row (its number), expected_hash. Returns how many rows were read and kept, how many
    each filter left out of those that reached it, and the kind of hash published.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    left_out: Counter[str] = Counter()
    seen: set[bytes] = set()
    read = kept = 0
    kind: str | None = None
    for number, frame in enumerate(_frames(files, laion)):
        read += len(frame)
        frame = _unrepeated(_addressed(_passing(frame, laion, left_out), left_out), seen, left_out)
        wanted = frame.head(laion.max_images - kept)
        left_out["over max_images"] += len(frame) - len(wanted)
        kind = kind or next((HASHES[len(text)] for text in wanted["hash"] if text), None)
        if len(wanted):
            rows = wanted.assign(
                row=range(kept, kept + len(wanted)),
                # img2dataset reports one kind; a hash of the other kind cannot be compared.
                expected_hash=[text if text and HASHES[len(text)] == kind else None for text in wanted["hash"]],
            )
            table = pa.Table.from_pandas(rows, schema(), preserve_index=False)
            pq.write_table(table, urls / f"{number:05d}.parquet")
        kept += len(wanted)
        if kept >= laion.max_images:
            break
    counts = {name: count for name, count in left_out.items() if count}
    if not kept:
        raise StageError(f"none of {read} rows passes the filters ({_said(counts)}); loosen download.laion")
    return {"read": read, "kept": kept, "left_out": counts, "hash_kind": kind or "md5"}


def schema() -> pa.Schema:
    """Columns of a table of addresses that `crawl.download` takes."""
    import pyarrow as pa

    texts = [("url", pa.string()), ("caption", pa.string()), ("expected_hash", pa.string())]
    return pa.schema([*texts, ("row", pa.int64())])


def _frames(files: list[Path], laion: LaionParams) -> Iterator[pd.DataFrame]:
    """Rows of all tables, 65,536 at a time, under the names known here; numbers as float64, texts as published."""
    import pandas as pd
    import pyarrow.parquet as pq

    total = sum(pq.read_metadata(file).num_rows for file in files)
    with tqdm(desc="filter", total=total, unit="row", mininterval=1, dynamic_ncols=True, delay=2) as bar:
        for file in files:
            table = pq.ParquetFile(file)
            names = _names(file.name, table.schema_arrow.names, laion)
            for batch in table.iter_batches(BATCH_ROWS, columns=sorted(names.values())):
                published = batch.to_pandas()
                frame = pd.DataFrame(index=published.index)
                for meaning in ALIASES:
                    frame[meaning] = published[names[meaning]] if meaning in names else None
                for meaning in NUMBERS:
                    frame[meaning] = pd.to_numeric(frame[meaning], errors="coerce").astype("float64")
                yield frame
                bar.update(len(frame))


def _names(file: str, columns: list[str], laion: LaionParams) -> dict[str, str]:
    """Meaning -> column. Raises `StageError` where there are no addresses, or a filter has no column to look at."""
    lower = {name.lower(): name for name in columns}
    found = {
        meaning: next(lower[alias] for alias in aliases if alias in lower)
        for meaning, aliases in ALIASES.items()
        if any(alias in lower for alias in aliases)
    }
    if "url" not in found:
        raise StageError(f"{file} has no column of addresses (there are {', '.join(columns)}); give another table")
    for name, needed in NEEDED.items():
        missing = [ALIASES[meaning][0] for meaning in needed if meaning not in found]
        if missing and getattr(laion, name) not in (None, ()):
            off = "[]" if name == "languages" else "null"
            raise StageError(
                f"{file} has no column '{missing[0]}', at which download.laion.{name} looks; "
                f"set that to {off} to do without"
            )
    return found


def _passing(frame: pd.DataFrame, laion: LaionParams, left_out: Counter[str]) -> pd.DataFrame:
    """The rows that pass every filter; what a filter cannot know does not pass it."""
    short, long = frame[["width", "height"]].min(axis=1, skipna=False), frame[["width", "height"]].max(axis=1)
    tests = {}
    if laion.min_side is not None:
        tests["smaller than min_side"] = short >= laion.min_side
    if laion.max_aspect_ratio is not None:
        tests["longer than max_aspect_ratio"] = long <= laion.max_aspect_ratio * short
    if laion.min_similarity is not None:
        tests["under min_similarity"] = frame["similarity"] >= laion.min_similarity
    if laion.max_watermark is not None:
        tests["over max_watermark"] = frame["watermark"] <= laion.max_watermark
    if laion.max_unsafe is not None:
        tests["over max_unsafe, or unknown"] = frame["unsafe"] <= laion.max_unsafe
    if laion.languages:
        tests["of another language"] = frame["language"].isin(laion.languages)
    for name, passes in tests.items():
        before = len(frame)
        frame = frame[passes[frame.index]]
        left_out[name] += before - len(frame)
    return frame


def _addressed(frame: pd.DataFrame, left_out: Counter[str]) -> pd.DataFrame:
    """The rows that have an http(s) address; texts as text or None, hashes as hexadecimal digits or None."""
    import pandas as pd

    texts = {name: [_text(value) for value in frame[name]] for name in ("url", "caption", "hash")}
    texts["hash"] = [
        text if text and re.fullmatch(r"[0-9a-f]{32}|[0-9a-f]{64}", text) else None for text in texts["hash"]
    ]
    frame = frame.assign(**{name: pd.Series(values, frame.index, dtype=object) for name, values in texts.items()})
    passes = frame["url"].map(_is_address).astype(bool)
    left_out["no http(s) address"] += int((~passes).sum())
    return frame[passes]


def _text(value: Any) -> str | None:
    """Text of a value without the blanks around it; None for bytes that are no UTF-8, and for what is missing."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    return None if value is None or value != value else str(value).strip()


def _is_address(url: Any) -> bool:
    """Whether a text is an http(s) address. Where its host lies is for the proxy to see, at the time of the request."""
    if not isinstance(url, str) or re.search(r"[\x00-\x20\x7f]", url):
        return False
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
    except ValueError:
        return False


def _unrepeated(frame: pd.DataFrame, seen: set[bytes], left_out: Counter[str]) -> pd.DataFrame:
    """The rows whose address was not there before; 16 bytes of memory are kept for each."""
    import numpy as np

    fresh = []
    for url in frame["url"]:
        mark = hashlib.sha256(url.encode("utf-8", "surrogatepass")).digest()[:16]
        fresh.append(mark not in seen)
        seen.add(mark)
    left_out["repeated"] += len(fresh) - sum(fresh)
    return frame[np.array(fresh, bool)]


def _collect(shards: Path, raw: Path, kind: str, judged: bool) -> dict[str, int]:
    """Shards of img2dataset -> tables of verified pictures and the list of outcomes in `raw`; returns their counts.

    `judged`: whether the filters let only safe rows pass.
    """
    import pyarrow.parquet as pq

    counts: Counter[str] = Counter()
    with (raw / OUTCOMES).open("w", encoding="utf-8", newline="") as file:
        outcomes = csv.writer(file, lineterminator="\n")
        outcomes.writerow(["key", "outcome", "url", "error", "expected_hash", "found_hash"])
        for number, shard in enumerate(sorted(shards.glob("*.parquet"))):
            rows = pq.read_table(shard).sort_by("row")
            found = [_outcome(row, kind) for row in rows.drop_columns(["jpg"]).to_pylist()]
            outcomes.writerows(found)
            counts.update(str(line[1]) for line in found)
            pictures = _pictures(rows, [line[1] == "success" for line in found], judged)
            pq.write_table(pictures, raw / f"pictures-{number:05d}.parquet", compression="none", row_group_size=64)
    return dict(sorted(counts.items()))


def _pictures(rows: pa.Table, succeeded: list[bool], judged: bool) -> pa.Table:
    """The rows that gave a picture: key, picture, caption, and what is known of its safety."""
    import pyarrow as pa

    kept = rows.filter(pa.array(succeeded))
    return pa.table(
        {
            "key": pa.array([_key(row) for row in kept["row"].to_pylist()], pa.string()),
            "picture": kept["jpg"],
            "caption": kept["caption"],
            "safety": pa.array(["safe" if judged else None] * kept.num_rows, pa.string()),
        }
    )


def _key(row: int) -> str:
    return f"{row:09d}"


def _outcome(row: dict[str, Any], kind: str) -> list[str | None]:
    """One line of the outcomes: what became of an address, in a few words, and why."""
    error, expected, found = row["error_message"] or "", row["expected_hash"], row[kind]
    if row["status"] == "success":
        outcome = "success" if expected is None or expected == found else "hash mismatch"
    elif "X-Robots-Tag" in error:
        outcome = "opted out"
    elif re.search(r"Error 470|failed: 470", error):
        outcome = "address refused"
    else:
        outcome = "no image" if row["status"] == "failed_to_resize" else "dead link"
    return [_key(row["row"]), outcome, row["url"], error, expected, found]
