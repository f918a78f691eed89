"""The source `laion`: tables of URLs and captions -> filtered, downloaded and verified images.

C. Schuhmann et al., "LAION-5B: An open large-scale dataset for training next generation image-text models"
(2022). The original was withdrawn; the research-safe release of Re-LAION replaces it.

Columns vary by release, so names are matched case-insensitively and values converted. The stage writes Parquet tables
of images, `outcomes.csv` with one line per requested URL, and the counts of filters and outcomes in the manifest.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from models.hashing import file_sha256
from models.json_files import Description, JsonObject
from tasks.runtime import atomic, workspace
from tasks.runtime.errors import StageError
from tasks.runtime.progress import progress
from tasks.transfer import crawl, hub

if TYPE_CHECKING:
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
"""Filter -> the columns that it needs."""
KEPT = ("row", "expected_hash")
"""Columns that img2dataset copies to its output."""
HASHES = {32: "md5", 64: "sha256"}
BATCH_ROWS = 65_536
OUTCOMES = "outcomes.csv"
COLUMNS = {"key": "key", "image": "picture", "captions": ["caption"], "safety": "safety"}
"""Columns of the tables of images, see `tasks.sources.entry.TableColumns`."""


@dataclass(frozen=True)
class Selection(Description):
    """Counts of the filters, stored in the scratch folder until the download is complete."""

    FORMAT = 1
    REMEDY = "delete the scratch folder of this dataset, then run the same command again"

    rows: int
    """Rows that were read."""
    kept: int
    left_out: dict[str, int]
    """Number of rows that each filter removed, of those that reached it."""
    hash_kind: str
    """Kind of the published hashes, "md5" or "sha256"."""

    def described(self) -> JsonObject:
        """The counts as recorded in the manifest."""
        return {"read": self.rows, "kept": self.kept, "left_out": self.left_out}


def copy(raw: Path, params: DownloadParams) -> tuple[str, JsonObject]:
    """Filter the tables, download and verify the images into `raw`; return the origin and the details of the manifest.

    Downloaded shards stay in the scratch folder until the stage is complete. Raises `StageError` if a filter lacks its
    column, no row passes, or fewer than `min_success_rate` of the URLs give an image.
    """
    work = workspace.scratch() / "laion"
    with atomic.writing_folder(work / "tables") as tables:
        origin = _tables(tables, params)
    files = sorted((work / "tables").rglob("*.parquet"))
    job = work / _identity(files, params.laion)
    filters = _filter_once(files, job, params.laion)
    crawl.download(job / "urls", job / "shards", list(KEPT), filters.hash_kind, params)
    outcomes = _collect(job / "shards", raw, filters.hash_kind, safety_filter=params.laion.max_unsafe is not None)
    asked, succeeded = sum(outcomes.values()), outcomes.get("success", 0)
    if succeeded < params.laion.min_success_rate * asked:
        raise StageError(
            f"{succeeded} of {asked} URLs gave an image ({_listed(outcomes)}), fewer than "
            f"download.laion.min_success_rate {params.laion.min_success_rate}; lower it (downloaded images are kept), "
            "or use another table"
        )
    print(f"download: of {asked} URLs {_listed(outcomes)}", flush=True)
    shutil.rmtree(work, ignore_errors=True)
    return origin, {"columns": COLUMNS, "filters": filters.described(), "outcomes": outcomes}


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _tables(target: Path, params: DownloadParams) -> str:
    """Copy the tables of URLs to `target` and return their origin."""
    if params.hub.repo is not None:
        return hub.copy(target, params)
    path = Path(params.path)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise StageError(f"download.path {path} is not a Parquet table or a folder with one; correct it")
    for number, file in enumerate(files):
        shutil.copyfile(file, target / f"{number:05d}.parquet")
    return path.resolve().name


def _identity(files: list[Path], laion: LaionParams) -> str:
    """Identifier of the work: hash of the tables and of the parameters that determine the result."""
    parts = laion.model_dump(mode="json", include={*NEEDED, "max_images", "shorter_side", "shard_size", "user_agent"})
    hashes = [file_sha256(file) for file in files]
    return hashlib.sha256(json.dumps([hashes, parts], sort_keys=True).encode()).hexdigest()[:16]


def _filter_once(files: list[Path], job: Path, laion: LaionParams) -> Selection:
    """Write the selected URLs into `job/urls`, unless an earlier run did, and return the counts of the filters."""
    counted = job / "filters.json"
    if not counted.exists():
        with atomic.writing_folder(job / "urls") as urls:
            selection = select(files, urls, laion)
        with atomic.writing(counted) as temporary:
            selection.write(temporary)
    try:
        selection = Selection.read(counted)
    except ValueError as error:
        raise StageError(str(error)) from None
    left_out = _listed(selection.left_out) or "none"
    print(f"download: {selection.kept} of {selection.rows} rows pass; left out: {left_out}", flush=True)
    return selection


def select(files: list[Path], urls: Path, laion: LaionParams) -> Selection:
    """Published tables -> tables of at most `laion.max_images` URLs in the folder `urls`, in the same order.

    The columns are url, caption, row (number of the selected row) and expected_hash.
    """
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
                # img2dataset computes one kind of hash; hashes of the other kind cannot be compared.
                expected_hash=[text if text and HASHES[len(text)] == kind else None for text in wanted["hash"]],
            )
            table = pa.Table.from_pandas(rows, schema(), preserve_index=False)
            pq.write_table(table, urls / f"{number:05d}.parquet")
        kept += len(wanted)
        if kept >= laion.max_images:
            break
    counts = {name: count for name, count in left_out.items() if count}
    if not kept:
        raise StageError(f"none of {read} rows passes the filters ({_listed(counts)}); relax those of download.laion")
    return Selection(read, kept, counts, kind or "md5")


def schema() -> pa.Schema:
    """Columns of a table of URLs for `crawl.download`."""
    texts = [("url", pa.string()), ("caption", pa.string()), ("expected_hash", pa.string())]
    return pa.schema([*texts, ("row", pa.int64())])


def _frames(files: list[Path], laion: LaionParams) -> Iterator[pd.DataFrame]:
    """Yield the rows of all tables in batches, with columns renamed to the keys of `ALIASES`.

    Numbers are converted to float64; strings are left as published.
    """
    total = sum(pq.read_metadata(file).num_rows for file in files)
    with progress(desc="filter", total=total, unit="row", delay=2) as bar:
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
    """Key of `ALIASES` -> column. Raises `StageError` if there is no column of URLs, or a filter lacks its column."""
    lower = {name.lower(): name for name in columns}
    found = {
        meaning: next(lower[alias] for alias in aliases if alias in lower)
        for meaning, aliases in ALIASES.items()
        if any(alias in lower for alias in aliases)
    }
    if "url" not in found:
        raise StageError(f"{file} has no column of URLs (found {', '.join(columns)}); use another table")
    for name, needed in NEEDED.items():
        missing = [ALIASES[meaning][0] for meaning in needed if meaning not in found]
        if missing and getattr(laion, name) not in (None, ()):
            off = "[]" if name == "languages" else "null"
            raise StageError(
                f"{file} has no column '{missing[0]}', which download.laion.{name} needs; "
                f"set that to {off} to disable the filter"
            )
    return found


def _passing(frame: pd.DataFrame, laion: LaionParams, left_out: Counter[str]) -> pd.DataFrame:
    """Rows that pass every filter; a missing value does not pass."""
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
    """Rows with an http(s) URL; strings are stripped, and invalid strings and hashes become None."""
    texts = {name: [_text(value) for value in frame[name]] for name in ("url", "caption", "hash")}
    texts["hash"] = [
        text if text and re.fullmatch(r"[0-9a-f]{32}|[0-9a-f]{64}", text) else None for text in texts["hash"]
    ]
    frame = frame.assign(**{name: pd.Series(values, frame.index, dtype=object) for name, values in texts.items()})
    passes = frame["url"].map(_is_address).astype(bool)
    left_out["no http(s) address"] += int((~passes).sum())
    return frame[passes]


def _text(value: object) -> str | None:
    """Stripped text of a value; None for missing values and bytes that are not UTF-8."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    return None if value is None or value != value else str(value).strip()


def _is_address(url: object) -> bool:
    """Whether a value is an http(s) URL. The proxy screens the address of the host when it is requested."""
    if not isinstance(url, str) or re.search(r"[\x00-\x20\x7f]", url):
        return False
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
    except ValueError:
        return False


def _unrepeated(frame: pd.DataFrame, seen: set[bytes], left_out: Counter[str]) -> pd.DataFrame:
    """Rows with a URL that did not occur before; `seen` stores 16 bytes per URL."""
    fresh = []
    for url in frame["url"]:
        mark = hashlib.sha256(url.encode("utf-8", "surrogatepass")).digest()[:16]
        fresh.append(mark not in seen)
        seen.add(mark)
    left_out["repeated"] += len(fresh) - sum(fresh)
    return frame[np.array(fresh, bool)]


def _collect(shards: Path, raw: Path, hash_kind: str, safety_filter: bool) -> dict[str, int]:
    """Shards of img2dataset -> tables of verified images and `outcomes.csv` in `raw`; return the counts of outcomes.

    `safety_filter` is whether the filters passed only safe rows.
    """
    counts: Counter[str] = Counter()
    with (raw / OUTCOMES).open("w", encoding="utf-8", newline="") as file:
        outcomes = csv.writer(file, lineterminator="\n")
        outcomes.writerow(["key", "outcome", "url", "error", "expected_hash", "found_hash"])
        for number, shard in enumerate(sorted(shards.glob("*.parquet"))):
            rows = pq.read_table(shard).sort_by("row")
            found = [_outcome(row, hash_kind) for row in rows.drop_columns(["jpg"]).to_pylist()]
            outcomes.writerows(found)
            counts.update(str(line[1]) for line in found)
            pictures = _pictures(rows, [line[1] == "success" for line in found], safety_filter)
            pq.write_table(pictures, raw / f"pictures-{number:05d}.parquet", compression="none", row_group_size=64)
    return dict(sorted(counts.items()))


def _pictures(rows: pa.Table, succeeded: list[bool], safety_filter: bool) -> pa.Table:
    """Columns key, picture, caption and safety of the downloaded images."""
    kept = rows.filter(pa.array(succeeded))
    return pa.table(
        {
            "key": pa.array([_key(row) for row in kept["row"].to_pylist()], pa.string()),
            "picture": kept["jpg"],
            "caption": kept["caption"],
            "safety": pa.array(["safe" if safety_filter else None] * kept.num_rows, pa.string()),
        }
    )


def _key(row: int) -> str:
    return f"{row:09d}"


def _outcome(row: JsonObject, hash_kind: str) -> list[str | None]:
    """One line of `outcomes.csv` for a row of img2dataset."""
    error, expected, found = row["error_message"] or "", row["expected_hash"], row[hash_kind]
    if row["status"] == "success":
        outcome = "success" if expected is None or expected == found else "hash mismatch"
    elif "X-Robots-Tag" in error:
        outcome = "opted out"
    elif re.search(r"Error 470|failed: 470", error):
        outcome = "address refused"
    else:
        outcome = "no image" if row["status"] == "failed_to_resize" else "dead link"
    return [_key(row["row"]), outcome, row["url"], error, expected, found]
