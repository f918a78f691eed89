"""Run the stages of the data on simulated rows, each as a process of its own, and measure time, CPU time and memory."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml

from infra.bench.results import machine
from tasks.formats.verdict import Verdict
from tasks.params import composition
from tasks.runtime import atomic
from tasks.runtime.errors import StageError

JSON, TABLE = "bench_scale.json", "bench_scale.md"
STAGES = ("ingest", "write", "validate", "encode", "batches", "pixels", "hash")
"""Measurements in their order; those after `write` need its files, and `batches` those of `encode`."""
LIMIT_BYTES = 1536 << 20
"""Memory that no stage may exceed."""
HASHED_BYTES = 1 << 30
CODEC_ROWS = 2000
PEAK = Path(__file__).with_name("peak.py")
WRITER, READER = "infra.bench.scale.simulated", "infra.bench.scale.reading"
SLOPE_BYTES = 60 << 20
"""Memory per million rows that no stage should exceed."""
FEWER = 4
"""How many times fewer rows the first of the two runs has from which the slope follows."""


@dataclass(frozen=True)
class Plan:
    """Which stages run on how many rows."""

    work: Path
    rows: int
    ingest_rows: int
    """Rows that `ingest` decodes, which takes the longest."""
    only: tuple[str, ...] = STAGES


@dataclass(frozen=True)
class Row:
    """A measurement; `memory_bytes` is the peak of the process and of the largest of its children."""

    stage: str
    rows: int
    seconds: float
    cpu_seconds: float
    memory_bytes: int
    own_bytes: int
    """Peak of the memory of the process without the files that it maps, which the system can take back."""
    slope_bytes: float | None = None
    """Growth of `own_bytes` per million rows between a run on `FEWER` times fewer rows and this one."""

    @property
    def cells(self) -> str:
        """The row of the table."""
        slope = "" if self.slope_bytes is None else f"{self.slope_bytes / 2**20:,.0f}"
        hours = self.cpu_seconds / self.rows * 1e6 / 3600
        return (
            f"| {self.stage} | {self.rows:,} | {self.seconds:,.0f} | {self.cpu_seconds:,.0f} | "
            f"{self.rows / self.cpu_seconds:,.0f} | {hours:.2f} | {self.memory_bytes / 2**20:,.0f} | {slope} |"
        )


def run(plan: Plan, reports: Path) -> None:
    """Measure every stage of the plan, print a table, and write it and the figures to `reports`.

    Raises:
        StageError: if a stage fails.
    """
    rows = measured(plan)
    described = machine()
    text = "\n".join(
        [
            (
                "| stage | rows | seconds | CPU seconds | rows per CPU second | CPU hours per million rows | MiB | "
                "more MiB per million rows |"
            ),
            "|---|---|---|---|---|---|---|---|",
            *(row.cells for row in rows),
            "",
            (
                f"{described['cpu']}, {described['cores']} cores, load {os.getloadavg()[0]:.1f}. Metadata are real, "
                "images of 8x8 pixels repeat; `hash` is the MD5 of a file, as DVC computes it, its row 1 MB."
            ),
        ]
    )
    atomic.write_json(reports / JSON, {"machine": described, "rows": [asdict(row) for row in rows]})
    atomic.write_text(reports / TABLE, text + "\n")
    print(text)
    if large := [row.stage for row in rows if row.memory_bytes > LIMIT_BYTES]:
        raise StageError(f"more than {LIMIT_BYTES >> 20} MiB: {', '.join(large)}; see {reports / TABLE}")
    if steep := [row.stage for row in rows if (row.slope_bytes or 0) > SLOPE_BYTES]:
        print(f"more than {SLOPE_BYTES >> 20} MiB per million rows: {', '.join(steep)}; see {reports / TABLE}")


def measured(plan: Plan) -> list[Row]:
    """Measure every stage of the plan on a part of the rows and on all of them.

    Raises:
        StageError: if a stage fails.
    """
    fewer = replace(plan, rows=plan.rows // FEWER, ingest_rows=plan.ingest_rows // FEWER)
    first = _all(plan.work / "scale" / "fewer", fewer)
    return [_with_slope(row, first[row.stage]) for row in _all(plan.work / "scale" / "all", plan).values()]


def _all(folder: Path, plan: Plan) -> dict[str, Row]:
    folder.mkdir(parents=True, exist_ok=True)
    params = _params(folder)
    return {name: _measured(folder, name, plan, params) for name in plan.only}


def _with_slope(row: Row, fewer: Row) -> Row:
    more = row.rows - fewer.rows
    return replace(row, slope_bytes=(row.own_bytes - fewer.own_bytes) * 1e6 / more) if more else row


def _params(folder: Path) -> Path:
    """Write the parameters of all stages: the digits, captioned, with limits that simulated rows hold."""
    document = composition.compose("digits", ["conditioning=text"])
    document["validate"] |= {"min_side": 8, "caption_scripts": ["LATIN"]}
    document["encode"] |= {"captions": "tokens"}
    document["codec"]["text"] |= {"steps": 3}
    document["image"] |= {"resolution": 8}
    file = folder / "params.yaml"
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    return file


def _measured(folder: Path, name: str, plan: Plan, params: Path) -> Row:
    count = plan.ingest_rows if name == "ingest" else plan.rows
    if name == "hash":
        return _hash(folder)
    if name == "ingest":
        _wait(folder, [WRITER, "raw", str(folder), str(count)])
    if name == "encode":
        if not (folder / "accepted.json").exists():  # without `validate` among the stages
            Verdict().write(folder / "accepted.json")
        _make_codec(folder, params)
    print(f"bench: {name} on {count:,} rows", flush=True)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    peak, own = _wait(folder, _command(folder, name, count, params))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    row = Row(name, count, time.perf_counter() - began, cpu, peak, own)
    print(row.cells, flush=True)
    return row


def _make_codec(folder: Path, params: Path) -> None:
    """Train a text encoder on few rows; its quality does not matter."""
    few = folder / "few"
    _wait(folder, [WRITER, "images", str(few), str(CODEC_ROWS)])
    Verdict().write(few / "accepted.json")
    made = (few / "images", few / "accepted.json", folder / "codec")
    _wait(folder, ["tasks.codec", *map(str, made), "--params", str(params)])


def _command(folder: Path, name: str, count: int, params: Path) -> list[str]:
    paths = {
        "ingest": ("raw", "ingested", "ingested-quarantine"),
        "validate": ("images", "quarantine", "accepted.json", "validation"),
        "encode": ("images", "accepted.json", "codec", "latents"),
    }
    if name == "write":
        return [WRITER, "images", str(folder), str(count)]
    if name in ("batches", "pixels"):
        return [READER, name, str(folder)]
    return [f"tasks.{name}", *(str(folder / path) for path in paths[name]), "--params", str(params)]


def _wait(folder: Path, command: Sequence[str]) -> tuple[int, int]:
    """Run `python -m command` to its end; returns both peaks of the memory in bytes, see `peak.py`."""
    log = folder / "output.txt"
    environment = os.environ | {"AFTERIMAGE_SCRATCH": str(folder / "scratch")}
    whole = [sys.executable, "-I", "-S", str(PEAK), sys.executable, "-m", *command]
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(whole, env=environment, stdout=subprocess.PIPE, stderr=output, text=True, check=False)
    if done.returncode:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise StageError(f"{command[0]} failed ({' '.join(last)}); {log} has its output")
    peak, own = map(int, done.stdout.split()[-2:])
    return peak, own


def _hash(folder: Path) -> Row:
    """Measure the MD5 that DVC computes of every file; one megabyte counts as a row."""
    data, file = os.urandom(1 << 20), folder / "hashed"
    with file.open("wb") as stream:
        for _ in range(HASHED_BYTES >> 20):
            stream.write(data)
    began, cpu = time.perf_counter(), time.process_time()
    with file.open("rb") as stream:
        hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    file.unlink()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Row("hash", HASHED_BYTES // 10**6, seconds, cpu, memory, memory)
