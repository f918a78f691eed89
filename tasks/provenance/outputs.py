"""The outputs that a recorded `dvc.lock` names: in the DVC cache, in the work tree, or in the DVC remote."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from tasks.provenance import objects, source
from tasks.provenance.checks import Check
from tasks.runtime import lineage
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from models.json_files import JsonObject

CACHE, TREE = "cache", "work tree"
SHORT = 12


@dataclass(frozen=True)
class Places:
    """Where the code and the bytes of a version may be."""

    root: Path
    """The work tree and Git repository."""
    cache: Path
    """The folder of its DVC cache."""
    remote: str | None = None
    """Name of the default DVC remote; None if there is none."""
    always_remote: bool = False
    """Whether the remote must hold every object, also those that the cache holds."""


def of(stages: JsonObject) -> dict[str, str]:
    """Return path -> hash of the outputs of all stages."""
    return {out["path"]: out["md5"] for entry in stages.values() for out in entry.get("outs", [])}


@dataclass
class Outputs:
    """The recorded outputs, and where each of them was found with the recorded content."""

    recorded: dict[str, str]
    """Path -> hash."""
    places: Places
    fetched: Path
    """Folder of the cache for what is fetched from the remote."""
    found: dict[str, str] = field(default_factory=dict)
    """Path -> `CACHE`, `TREE` or the name of the remote."""

    def check(self, clone: Path | None) -> Check:
        """Compute the hash of every output; `clone` is the commit with its `dvc.lock`, needed for the remote."""
        top = Check("outputs", True, "")
        below = {path: self._here(path) for path in self.recorded}
        absent = [path for path, check in below.items() if check is None]
        below |= self._remote(absent, clone)
        top.below = [check for check in below.values() if check is not None]
        top.detail = f"{len(self.found)} of {len(below)} have the recorded hashes"
        return top

    def read(self, path: str, name: str) -> bytes:
        """Return the content of the file `name` of a folder that was found.

        Raises:
            StageError: if the folder was not found.
        """
        if self.found.get(path) == TREE:
            return (self.places.root / path / name).read_bytes()
        if path not in self.found:
            raise StageError(f"{path} was not found with the recorded content")
        cache = self.places.cache if self.found[path] == CACHE else self.fetched
        return objects.in_cache(cache, objects.read_listing(cache, self.recorded[path])[name]).read_bytes()

    def _here(self, path: str) -> Check | None:
        """Check an output on this machine; None if it is not there, or the remote is to be checked."""
        md5 = self.recorded[path]
        if self.places.always_remote:
            return None
        try:
            return self._found(path, CACHE, objects.require(self.places.cache, md5))
        except objects.DamagedObjectError as error:
            return Check(path, False, f"{error}; delete it, then 'dvc fetch {path}' or 'dvc repro' makes it again")
        except objects.MissingObjectError:
            kept = self.places.root / path
            if not kept.exists() or objects.path_md5(kept) != md5:
                return None
            return self._found(path, TREE, len(objects.listing(kept)) if kept.is_dir() else 1)

    def _found(self, path: str, where: str, files: int) -> Check:
        self.found[path] = where
        named = f"{files} files" if files != 1 else "1 file"
        return Check(path, True, f"{named} in the {where}, md5 {self.recorded[path][:SHORT]}")

    def _remote(self, paths: list[str], clone: Path | None) -> dict[str, Check | None]:
        """Fetch outputs from the remote into a cache of their own, and check them there."""
        if not paths:
            return {}
        remote = self.places.remote
        if remote is None or clone is None:
            reason = "no DVC remote is configured" if remote is None else "the commit is not here, so DVC cannot fetch"
            return {path: Check(path, False, f"neither in the cache nor in the work tree; {reason}") for path in paths}
        source.share_dvc_settings(self.places.root, clone, self.fetched)
        with contextlib.suppress(StageError):  # DVC fails if the remote lacks some, which the hashes will show
            source.dvc(clone, "fetch", *paths)
        checks: dict[str, Check | None] = {}
        for path in paths:
            try:
                files = objects.require(self.fetched, self.recorded[path])
                checks[path] = self._found(path, f"remote {remote}", files)
            except (objects.MissingObjectError, objects.DamagedObjectError):
                checks[path] = Check(path, False, f"remote {remote} does not hold it with the recorded content")
        return checks


def write_state(clone: Path, stages: JsonObject, params: str | None) -> None:
    """Give a clone the recorded `dvc.lock` and `params.yaml`; without the latter it keeps that of its commit."""
    lock = yaml.safe_dump({"schema": "2.0", "stages": stages}, sort_keys=False)
    (clone / lineage.LOCK).write_text(lock, encoding="utf-8")
    if params is not None:
        (clone / lineage.PARAMS).write_text(params, encoding="utf-8")
