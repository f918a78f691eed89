"""Recognise a registration that would change nothing, without loading MLflow.

`register` runs at every `dvc repro`, and loading MLflow takes most of its time. A registration is recorded with all
that decides what it does: its inputs, parameters and code, the state of the SQLite file, and the files that MLflow
keeps of it. While none of these differs, the next one has nothing to add. As in DVC, a file is known by its size and
the time of its last change. With a tracking server nothing is recorded, because its state cannot be seen.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tasks.runtime import atomic, store, workspace

if TYPE_CHECKING:
    from tasks.params import RegisterParams

FILE = "registered.json"
CODE = ("mlflow", "models", "tasks")
"""Folders of the code that a registration runs."""
WRITES_AHEAD = ("", "-wal", "-journal")
"""Suffixes of the SQLite file and of those that hold its latest changes."""

State: TypeAlias = "tuple[str, int, int]"
"""Name of a file, its size in bytes and the time of its last change in nanoseconds."""


@dataclass(frozen=True)
class Registration:
    """What a registration reads."""

    inputs: Sequence[Path]
    params: RegisterParams

    def recorded(self) -> list[str] | None:
        """Return what the same registration printed; None if there was none, or anything has changed since."""
        try:
            found = json.loads(_file().read_text(encoding="utf-8"))
            kept, key, lines = found["kept"], found["key"], found["lines"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return lines if key == self._key(kept) else None

    def record(self, kept: Sequence[str], lines: Sequence[str]) -> None:
        """Record that this registration is done and printed `lines`; `kept` are the folders of its artifacts."""
        if (key := self._key(kept)) is not None:
            atomic.write_json(_file(), {"kept": [*kept], "key": key, "lines": [*lines]})

    def _key(self, kept: Sequence[str]) -> str | None:
        uri = workspace.tracking_uri()
        if not uri.startswith(store.SQLITE) or any("://" in place for place in kept):
            return None
        seen = {
            "database": [uri, [*_states(Path(uri.removeprefix(store.SQLITE) + suffix) for suffix in WRITES_AHEAD)]],
            "artifacts": [[place, _below(Path(place), "*")] for place in kept],
            "inputs": [[str(path), _below(path, "*")] for path in self.inputs],
            "code": [_below(Path(folder), "*.py") for folder in CODE],
            "params": self.params.model_dump(mode="json"),
            "mlflow": importlib.metadata.version("mlflow"),
        }
        return hashlib.sha256(json.dumps(seen, sort_keys=True).encode("utf-8")).hexdigest()


def _file() -> Path:
    return workspace.scratch() / FILE


def _below(path: Path, pattern: str) -> list[State]:
    """Return the states of a file, or of the files below a folder whose names match; empty if it does not exist."""
    return sorted(_states([path] if path.is_file() else path.rglob(pattern)))


def _states(files: Iterator[Path] | Sequence[Path]) -> Iterator[State]:
    for file in files:
        if file.is_file():
            status = file.stat()
            yield str(file), status.st_size, status.st_mtime_ns
