"""A tiny work tree in which any single stage can be made undone and run again, and disturbed while it runs.

`python -m dvc repro --single-item STAGE` is one process group of real processes. `Drill.faults` names everything in
which the tree then differs from one that nothing disturbed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeAlias

import psutil
import yaml

from tests.support import tiny, warm_dvc

STAGES = list(yaml.safe_load((tiny.ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"])
TIMES = "reports/timing/"
"""The one folder whose bytes differ from run to run."""
LOGS_TO_MLFLOW = ("train", "register")
OBJECTS = Path(".dvc") / "cache" / "files" / "md5"
Entries: TypeAlias = tuple[str, ...]
"""Rows of MLflow's store, without what differs from run to run."""
END_SECONDS = 1200.0
POLL_SECONDS = 0.01


def environment() -> dict[str, str]:
    """Variables of a person who has nothing set, with this environment's Python first on the PATH."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "AFTERIMAGE_"))}
    return kept | {"PATH": f"{Path(sys.executable).parent}:{kept['PATH']}", "PYTHONUNBUFFERED": "1"}


def hashes(tree: Path) -> dict[str, str]:
    """Path -> hash of everything that the chain wrote, as DVC recorded it, without what differs from run to run."""
    lock = yaml.safe_load((tree / "dvc.lock").read_text(encoding="utf-8"))
    outs = [out for stage in lock["stages"].values() for out in stage.get("outs", [])]
    return {out["path"]: out["md5"] for out in outs if not out["path"].startswith(TIMES)}


class Repro:
    """A running `dvc repro --single-item`, in a process group of its own.

    It is started from the command line if `cold`, and else by `warm_dvc`.
    """

    def __init__(self, tree: Path, stage: str, log: Path | None = None, cold: bool = False, **more: str) -> None:
        """Start it, with `more` in its environment, and with its output in the file `log`."""
        self.stage = stage
        self._log = log or tree.parent / "log"
        arguments = ["repro", "--single-item", stage]
        variables = environment() | more
        self._process: subprocess.Popen[bytes] | BaseProcess
        self._log.write_bytes(b"")
        if not cold:
            self._process = warm_dvc.start(arguments, tree, variables, self._log)
            return
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dvc", *arguments],
                cwd=tree,
                env=variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def began(self) -> bool:
        """Whether DVC has announced the stage."""
        return f"Running stage '{self.stage}'" in self.output

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def ended(self) -> bool:
        if isinstance(self._process, BaseProcess):
            return self._process.exitcode is not None
        return self._process.poll() is not None

    def cpu_seconds(self) -> float:
        """Processor time of DVC and the processes below it; unlike seconds it does not depend on other work here."""
        with suppress(psutil.NoSuchProcess):
            dvc = psutil.Process(self.pid)
            return sum(map(_seconds_of, [dvc, *dvc.children(recursive=True)]))
        return 0.0

    def measure(self) -> float:
        """Wait for the end, which must be success; returns the processor time from the start of the stage on."""
        wait_until(lambda: self.began, self)
        before, spent = self.cpu_seconds(), 0.0
        while not self.ended():
            spent = max(spent, self.cpu_seconds() - before)
            time.sleep(POLL_SECONDS)
        assert self.wait() == 0, self.output
        return spent

    def kill(self, victim: str) -> None:
        """Send SIGKILL to `all` processes, to the `stage` or to `dvc` alone, and wait for the end of DVC."""
        stage = self._stage_process()
        if victim == "all" or (victim == "stage" and stage is None):
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        elif victim == "dvc":
            self._process.kill()
        elif stage is not None:
            with suppress(psutil.NoSuchProcess):
                stage.kill()
        self.wait()

    def wait(self) -> int:
        """Wait for the end of DVC; returns its exit code."""
        if not isinstance(self._process, BaseProcess):
            return self._process.wait(END_SECONDS)
        self._process.join(END_SECONDS)
        assert self._process.exitcode is not None, f"{self.stage} did not end"
        return self._process.exitcode

    def _stage_process(self) -> psutil.Process | None:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.pid).children(recursive=True):
                return child  # its shell, if any, is replaced by it
        return None


def _seconds_of(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return times.user + times.system + times.children_user + times.children_system
    return 0.0


@dataclass
class Drill:
    """A tiny work tree in which every stage has run undisturbed, and what is known of that run."""

    tree: Path
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    """Processor time of each stage, from the line in which DVC announces it."""
    lock: dict[str, dict[str, str]] = field(default_factory=dict)
    """Stage -> path -> hash, as DVC recorded them."""
    files: dict[str, str] = field(default_factory=dict)
    """Path of an output -> hash of what is there."""
    before: dict[str, Entries] = field(default_factory=dict)
    """Stage that logs to MLflow -> what the store holds before it."""
    store: dict[str, Entries] = field(default_factory=dict)
    """The same after it."""

    @classmethod
    def make(cls, folder: Path, database: Path) -> Drill:
        """Run every stage once in `folder`, with a migrated `database` as MLflow's store."""
        drill = cls(tiny.tree(folder / "tree"))
        shutil.copy(database, drill.tree / "mlflow.db")
        for stage in STAGES:
            if stage in LOGS_TO_MLFLOW:
                drill._keep_store(stage)
                drill.before[stage] = drill._stored()
            repro = Repro(drill.tree, stage)
            drill.cpu_seconds[stage] = repro.measure()
            if stage in LOGS_TO_MLFLOW:
                drill.store[stage] = drill._stored()
        drill.lock = {stage: drill.recorded(stage) for stage in STAGES}
        drill.files = {path: digest(drill.tree / path) for stage in STAGES for path in drill.outs(stage)}
        return drill

    def bytes_of(self, stage: str) -> int:
        """Size of all that `stage` writes."""
        paths = [self.tree / path for path in self.outs(stage)]
        return sum(file.stat().st_size for path in paths for file in [path, *path.rglob("*")] if file.is_file())

    def outs(self, stage: str) -> list[str]:
        """Paths of the outputs whose bytes do not depend on the time."""
        entry = yaml.safe_load((self.tree / "dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]
        return [path for path in entry.get("outs", []) + entry.get("metrics", []) if not path.startswith(TIMES)]

    def is_recorded(self, stage: str) -> bool:
        """Whether `dvc.lock` can be read and has an entry of `stage`."""
        try:
            return stage in self._lock_file()["stages"]
        except (yaml.YAMLError, KeyError, TypeError):
            return False  # cut off

    def recorded(self, stage: str) -> dict[str, str]:
        """Path -> hash of the outputs of `stage` in `dvc.lock`; empty if it is not there."""
        outs = self._lock_file()["stages"].get(stage, {}).get("outs", [])
        return {out["path"]: out["md5"] for out in outs if not out["path"].startswith(TIMES)}

    def undo(self, stage: str) -> None:
        """Remove all that `stage` wrote: outputs, record, cached objects, checkpoints, and its part of MLflow."""
        lock = self._lock_file()
        entry = lock["stages"].pop(stage, {})
        (self.tree / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False), encoding="utf-8")
        kept = {name for other in lock["stages"].values() for name in self._objects(other)}
        for name in self._objects(entry) - kept:
            (self.tree / OBJECTS / name[:2] / name[2:]).unlink(missing_ok=True)
        for out in entry.get("outs", []):
            path = self.tree / out["path"]
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for folder in (Path(".dvc") / "cache" / "runs", Path(".scratch")):
            shutil.rmtree(self.tree / folder, ignore_errors=True)
        if stage in LOGS_TO_MLFLOW:
            self._restore_store(stage)

    def written(self, stage: str) -> str:
        """How far `stage` is with its outputs: `nothing`, `a part` or `everything`, or all is `recorded` by DVC.

        `register` has no files; for it, the same of its entries in MLflow.
        """
        if self.is_recorded(stage):
            return "recorded"
        if not self.outs(stage):
            stored = self._stored()
            return {self.before[stage]: "nothing", self.store[stage]: "everything"}.get(stored, "a part")
        paths = [self.tree / path for path in self.outs(stage)]
        if all(path.exists() for path in paths):
            return "everything"
        return "a part" if any(map(_begun, paths)) else "nothing"

    def cut_off(self, stage: str) -> list[str]:
        """Outputs of `stage` that are there and differ from those of an undisturbed run."""
        there = [path for path in self.outs(stage) if (self.tree / path).exists()]
        return [path for path in there if digest(self.tree / path) != self.files[path]]

    def faults(self, stage: str, stored: Entries | None = None) -> list[str]:
        """All in which the tree differs from the undisturbed one after `stage` ran again.

        `stored` is what MLflow holds, if its store is not the SQLite file of the tree.
        """
        recorded = self.recorded(stage)
        found = [f"{path} is recorded as {recorded.get(path)}" for path, value in self.lock[stage].items()
                 if recorded.get(path) != value]  # fmt: skip
        found += [f"{path} differs" for path in self.outs(stage) if digest(self.tree / path) != self.files[path]]
        found += [f"{path.relative_to(self.tree)} is left" for path in self._leftovers()]
        for name in self._objects(self._lock_file()["stages"][stage]):
            path = self.tree / OBJECTS / name[:2] / name[2:]
            if not path.is_file() or hashlib.md5(path.read_bytes()).hexdigest() != name.removesuffix(".dir"):  # noqa: S324
                found.append(f"the cache has no whole {name}")
        if stage in LOGS_TO_MLFLOW and (stored := stored or self._stored()) != self.store[stage]:
            found.append(f"MLflow differs: {set(stored) ^ set(self.store[stage]) or 'duplicates'}")
        return found

    def repaired(self) -> bool:
        """Run the documented command of repair; whether it had to repair anything."""
        return "nothing to repair" not in tiny.run(self.tree, "flows.recover")

    def _leftovers(self) -> Iterator[Path]:
        for folder in ("data", "outputs", "reports", ".scratch"):
            yield from (self.tree / folder).rglob("*.tmp")

    def _lock_file(self) -> dict[str, dict[str, dict[str, list[dict[str, str]]]]]:
        return yaml.safe_load((self.tree / "dvc.lock").read_text(encoding="utf-8"))

    def _objects(self, entry: dict[str, list[dict[str, str]]]) -> set[str]:
        """Names in DVC's cache of the objects of a stage's outputs."""
        names = {out["md5"] for out in entry.get("outs", [])}
        for name in [name for name in names if name.endswith(".dir")]:
            listing = self.tree / OBJECTS / name[:2] / name[2:]
            if listing.is_file():
                names |= {row["md5"] for row in json.loads(listing.read_text(encoding="utf-8"))}
        return names

    def _keep_store(self, stage: str) -> None:
        kept = self.tree.parent / f"before-{stage}"
        kept.mkdir()
        shutil.copy(self.tree / "mlflow.db", kept)
        if (self.tree / "mlruns").is_dir():
            shutil.copytree(self.tree / "mlruns", kept / "mlruns")

    def _restore_store(self, stage: str) -> None:
        for left in self.tree.glob("mlflow.db*"):
            left.unlink()
        shutil.rmtree(self.tree / "mlruns", ignore_errors=True)
        shutil.copytree(self.tree.parent / f"before-{stage}", self.tree, dirs_exist_ok=True)

    def _stored(self) -> Entries:
        with closing(sqlite3.connect(self.tree / "mlflow.db")) as store:
            return entries(lambda query: store.execute(query).fetchall())


def entries(ask: Callable[[str], list[tuple[object, ...]]]) -> Entries:
    """Runs, points of curves, versions and aliases in MLflow's database, of which `ask` returns the rows of a query."""
    kinds = "SELECT t.value, r.status FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid"
    queries = (
        f"{kinds} WHERE t.key = 'afterimage.kind' AND r.lifecycle_stage = 'active'",
        "SELECT DISTINCT key, step FROM metrics WHERE key NOT LIKE 'system/%'",
        "SELECT name, version, current_stage FROM model_versions WHERE current_stage <> 'Deleted_Internal'",
        "SELECT name, alias, version FROM registered_model_aliases",
    )
    return tuple(sorted(str(tuple(row)) for query in queries for row in ask(query)))


def _begun(path: Path) -> bool:
    return path.exists() or any(path.parent.glob(f".{path.name}.*.tmp"))


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files."""
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            found.update(f"{file.relative_to(path)}\0".encode() + file.read_bytes() + b"\0")
    return found.hexdigest()


def wait_until(condition: Callable[[], bool], repro: Repro) -> bool:
    """Wait until `condition()`; False if DVC ended before."""
    while not repro.ended():
        if condition():
            return True
        time.sleep(POLL_SECONDS)
    return condition()
