"""Where measurements are kept: `bench.json`, a part at a time, and what is drawn and tabulated from it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.runtime import atomic

FORMAT = 1


@dataclass(frozen=True)
class Results:
    """The folder of reports. Parts are kept under the name and the arguments they were measured with."""

    folder: Path
    again: bool = False

    @property
    def file(self) -> Path:
        return self.folder / "bench.json"

    def all(self) -> dict[str, Any]:
        """The parts measured so far, by name; those of another format count as not measured."""
        kept = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        return {name: part for name, part in kept.items() if part["format"] == FORMAT}

    def part(self, name: str, arguments: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a part unless it was measured with these arguments already."""
        from infra.bench import report

        arguments = json.loads(json.dumps(arguments, default=str))
        known = self.all().get(name, {})
        if known.get("arguments") == arguments and not self.again:
            print(f"bench: {name} was measured with these arguments; --again measures anew", flush=True)
        else:
            before, measured, after = load(), measure(), load()
            kept = {"format": FORMAT, "arguments": arguments, "machine": machine(), "load": [before, after], **measured}
            atomic.write_json(self.file, {**self.all(), name: kept})
        report.write(self.folder, self.all())


class Piecewise:
    """Pieces of a part that was begun, kept in `folder` until the part is whole: one that is cut off goes on there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[Path] = []

    def piece(self, arguments: Any, measure: Callable[[], Any]) -> Any:
        """What was measured with these arguments before the part was cut off, or else now; JSON."""
        name = hashlib.sha256(json.dumps(arguments, sort_keys=True, default=str).encode()).hexdigest()[:12]
        file = self._folder / f"{name}.json"
        if not file.exists():
            atomic.write_json(file, measure())
        self._files.append(file)
        return json.loads(file.read_text(encoding="utf-8"))

    def __enter__(self) -> Piecewise:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None:
            for file in self._files:
                file.unlink(missing_ok=True)


def load() -> float:
    """How busy the machine is: runnable processes, mean of the last minute."""
    return round(os.getloadavg()[0], 2)


def machine() -> dict[str, Any]:
    """What it was measured on."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def csv_text(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys -> CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
