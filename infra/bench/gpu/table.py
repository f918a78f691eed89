"""The result as JSON, and as tables in Markdown."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from infra.bench.gpu.plan import PARTS, Plan, Row
from tasks.runtime import atomic

if TYPE_CHECKING:
    from infra.bench.gpu.goals import Goal

FORMAT = 1
FILE, TABLE = "bench_gpu.json", "bench_gpu.md"
TINY = "**Tiny form on a CPU: it shows that every part runs; its numbers are meaningless.**"
COLUMNS = (
    ("batch", "batch", "d"),
    ("img_s", "img/s", ",.1f"),
    ("ms", "ms", ",.3f"),
    ("mfu", "MFU", ".1%"),
    ("tflops", "TFLOP/s", ",.2f"),
    ("tb_s", "TB/s", ".3f"),
    ("launches", "launches", ",.0f"),
    ("host_ms", "host ms", ",.2f"),
    ("device_ms", "GPU ms", ",.2f"),
    ("first_s", "first call s", ".1f"),
    ("peak_gb", "peak GB", ".2f"),
    ("psnr_db", "PSNR dB", ".1f"),
)
"""Field of `Row`, heading, format."""
LEGEND = (
    "ms: a training step, a batch of images, or a network evaluation. MFU: operations of the network (three times its "
    "forward pass in training) relative to the peak of the GPU's data sheet, or of a measured matrix product where the "
    "GPU is not listed. fp32 is full float32; that of the reference has TF32 in convolutions, PyTorch's default, and "
    "that of the runtimes has TF32 everywhere. Host ms and GPU ms are times per step under torch.profiler, which slows "
    "the host. PSNR: relative to fp32 in PyTorch."
)


@dataclass(frozen=True)
class Device:
    """What was measured, and by which versions."""

    name: str
    memory_gb: float | None
    torch: str
    cuda: str | None
    python: str


def describe(device: str) -> Device:
    """Describe the device; creates a context on the GPU."""
    versions = (torch.__version__, torch.version.cuda, platform.python_version())
    if device == "cpu":
        return Device("CPU", None, *versions)
    return Device(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / 1e9, *versions)


def write(folder: Path, plan: Plan, device: Device, rows: Sequence[Row], goals: Sequence[Goal]) -> None:
    """Write `bench_gpu.json` and `bench_gpu.md`; both are complete at every moment."""
    document = {
        "format": FORMAT,
        "tiny": plan.tiny,
        "device": device.__dict__,
        "minutes": plan.minutes,
        "seconds": plan.seconds,
        "rows": [row.to_json() for row in rows],
        "goals": [goal.to_json() for goal in goals],
    }
    atomic.write_json(folder / FILE, document)
    atomic.write_text(folder / TABLE, markdown(plan, device, rows, goals))


def markdown(plan: Plan, device: Device, rows: Sequence[Row], goals: Sequence[Goal]) -> str:
    """Return the report: goals, then a table for each part."""
    memory = f", {device.memory_gb:.0f} GB" if device.memory_gb else ""
    texts = [
        "# GPU benchmark",
        *([TINY] if plan.tiny else []),
        f"{device.name}{memory}, torch {device.torch}, CUDA {device.cuda}, Python {device.python}. {LEGEND}",
        "## Goals for one H100",
        table(
            ["goal", "wanted", "reached", ""],
            [[g.text, f"{g.wanted:,}", "" if g.reached is None else f"{g.reached:,.2f}", g.verdict] for g in goals],
        ),
    ]
    for part in PARTS:
        if found := [row for row in rows if row.part == part]:
            texts += [f"## {part.capitalize()}", _part(found)]
    return "\n\n".join(texts) + "\n"


def _part(rows: Sequence[Row]) -> str:
    """Return the table of one part: the columns that any of its rows has."""
    used = [column for column in COLUMNS if any(getattr(row, column[0]) is not None for row in rows)]
    notes = any(_note(row) for row in rows)
    lines = [
        [row.case, *(_cell(getattr(row, name), form) for name, _, form in used), *([_note(row)] if notes else [])]
        for row in rows
    ]
    return table(["case", *(heading for _, heading, _ in used), *(["note"] if notes else [])], lines)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _note(row: Row) -> str:
    if row.skipped:
        return f"skipped: {row.skipped}"
    return f"failed: {row.failed}" if row.failed else row.note or ""


def table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    rows = [titles, ["---"] * len(titles), *([cell.replace("|", "\\|") for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def line_of(row: Row) -> str:
    """Return a row as one line for the terminal."""
    values = [f"{_cell(getattr(row, name), form)} {heading}" for name, heading, form in COLUMNS if getattr(row, name)]
    return f"bench: {row.part}: {row.case}: {', '.join([*values, *([_note(row)] if _note(row) else [])])}"
