"""Storage of the measurements: `bench.json`, part by part, and the pieces of a part that was interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import torch

from tasks.runtime import atomic

if TYPE_CHECKING:
    from infra.bench.schema import Machine, Part

Piece = TypeVar("Piece")

FORMAT = 1


@dataclass(frozen=True)
class Results:
    """The folder of the reports; parts are stored by name, with the arguments of their measurement."""

    folder: Path
    again: bool = False

    @property
    def file(self) -> Path:
        return self.folder / "bench.json"

    def all(self) -> dict[str, Part]:
        """The parts measured so far, by name; those of another format are left out."""
        kept = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        return {name: part for name, part in kept.items() if part["format"] == FORMAT}

    def part(
        self, name: str, arguments: Mapping[str, object], measure: Callable[[], Mapping[str, object]]
    ) -> dict[str, Part]:
        """Measure a part unless it was measured with these arguments; returns all parts measured so far."""
        arguments = json.loads(json.dumps(arguments, default=str))
        known = self.all().get(name)
        if known and known["arguments"] == arguments and not self.again:
            print(f"bench: {name} was measured with these arguments; --again measures anew", flush=True)
        else:
            before, measured, after = load(), measure(), load()
            kept = {"format": FORMAT, "arguments": arguments, "machine": machine(), "load": [before, after], **measured}
            atomic.write_json(self.file, {**self.all(), name: kept})
        return self.all()


class Piecewise:
    """Stores the pieces of a part in `folder` until the part is complete: an interrupted one continues there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[Path] = []

    def piece(self, arguments: object, measure: Callable[[], Piece]) -> Piece:
        """The stored measurement with these arguments, or else a new one; the measurement is a JSON value."""
        name = hashlib.sha256(json.dumps(arguments, sort_keys=True, default=str).encode()).hexdigest()[:12]
        file = self._folder / f"{name}.json"
        if not file.exists():
            atomic.write_json(file, measure())
        self._files.append(file)
        return cast("Piece", json.loads(file.read_text(encoding="utf-8")))

    def __enter__(self) -> Piecewise:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            for file in self._files:
                file.unlink(missing_ok=True)


def load() -> float:
    """Runnable processes of the machine, mean of the last minute."""
    return round(os.getloadavg()[0], 2)


def machine() -> Machine:
    """The machine and the versions of this measurement."""
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
