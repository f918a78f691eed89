"""The content key of an evaluation: equal keys mean equal results, whatever the sweep, the commit or the name.

The stages before `train` run first, in `prepare`; `dvc.lock` then has the checksums of what they wrote. The key is a
hash of these, of the parameters that `train` and `evaluate` read, and of the Git ids of their code.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from models.json_files import JsonObject

TRAIN, TARGET = "train", "evaluate"
FORMAT = 1


@dataclass(frozen=True)
class Stages:
    """The part of `dvc.yaml` that a sweep runs."""

    upstream: tuple[str, ...]
    """Stages that `TARGET` needs and that do not depend on `TRAIN`, in their order."""
    trained: tuple[str, ...]
    """`TRAIN` and the stages between it and `TARGET`."""
    entries: JsonObject
    """Stage -> its entry in `dvc.yaml`."""

    def params(self, stages: Iterable[str]) -> list[str]:
        """Sections and parameters that these stages read."""
        return sorted({name for stage in stages for name in self.entries[stage].get("params", [])})

    def code(self, stages: Iterable[str]) -> list[str]:
        """Dependencies of these stages that are neither outputs of a stage nor named by a parameter."""
        outs = {
            _path(out) for entry in self.entries.values() for kind in ("outs", "metrics") for out in entry.get(kind, [])
        }
        deps = {_path(dep) for stage in stages for dep in self.entries[stage].get("deps", [])}
        return sorted(dep for dep in deps if dep not in outs and "${" not in dep)


def _path(entry: str | Mapping[str, object]) -> str:
    """Path of an entry of `deps` or `outs`, which may be a mapping with options."""
    return entry if isinstance(entry, str) else next(iter(entry))


def stages(folder: Path, graph: Mapping[str, Sequence[str]]) -> Stages:
    """Divide the stages of `folder` by `graph`, stage -> the stages that it reads, in their order.

    Raises `StageError` if there is no `TRAIN` or `TARGET`.
    """
    entries = yaml.safe_load((folder / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    if not {TRAIN, TARGET} <= entries.keys():
        raise StageError(f"{folder / 'dvc.yaml'} has no stages {TRAIN} and {TARGET}; a sweep needs both")
    needed, downstream = {TARGET}, {TRAIN}
    for stage in reversed(list(graph)):
        if stage in needed:
            needed.update(graph[stage])
    for stage, reads in graph.items():
        if downstream.intersection(reads):
            downstream.add(stage)
    upstream = tuple(stage for stage in graph if stage in needed and stage not in downstream)
    return Stages(upstream, tuple(stage for stage in graph if stage in needed & downstream), entries)


def upstream_key(parts: Stages, document: JsonObject) -> str:
    """Hash of the parameters that the stages before `TRAIN` read; trials with the same one share their results."""
    return _digest({name: _value(document, name) for name in parts.params(parts.upstream)})


def evaluation_key(parts: Stages, document: JsonObject, upstream: JsonObject, code: JsonObject) -> str:
    """Key of an evaluation, SHA-256 in hex.

    Args:
        parts: The stages.
        document: The parameter file.
        upstream: Checksums of the outputs of the stages before `TRAIN`, see `outputs`.
        code: Path -> Git id of the code, see `code_ids`.
    """
    read = {name: _value(document, name) for name in parts.params(parts.trained)}
    return _digest({"format": FORMAT, "upstream": upstream, "params": read, "code": code})


def outputs(lock: Path, parts: Stages) -> JsonObject:
    """Stage -> path -> checksum of the outputs of the stages before `TRAIN`, from a `dvc.lock`."""
    locked = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"]
    return {stage: {out["path"]: out["md5"] for out in locked[stage].get("outs", [])} for stage in parts.upstream}


def code_ids(folder: Path, parts: Stages) -> dict[str, str]:
    """Path -> Git id of the code of `TRAIN` and the stages after it, as committed in `folder`.

    Raises `StageError` if a path is not committed.
    """
    paths = parts.code(parts.trained)
    names = "".join(f"HEAD:./{path}\n" for path in paths)
    command = ["git", "-C", str(folder), "cat-file", "--batch-check=%(objectname)"]
    done = subprocess.run(command, input=names, capture_output=True, text=True, check=False)
    ids = done.stdout.splitlines()
    for path, line in zip(paths, ids, strict=False):
        if not re.fullmatch(r"[0-9a-f]{40,64}", line):
            raise StageError(f"{path} is not committed in {folder}; commit it, because trials run the committed code")
    if done.returncode or len(ids) != len(paths):
        raise StageError(f"git cannot read the code in {folder}: {' '.join(done.stderr.split())}")
    return dict(zip(paths, ids, strict=True))


def _value(document: JsonObject, dotted: str) -> object:
    value: object = document
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _digest(value: object) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
