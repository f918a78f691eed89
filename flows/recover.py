"""`python -m flows.recover`: repair what a DVC command left that was killed, or whose machine went down.

DVC writes two files in place, so that a kill can leave half of them. `.dvc/tmp/rwlock` lists the commands at work by
process id, and an id that another process has by now blocks the work tree for ever. `dvc.lock` can no longer be read
if it is cut off. `make repro` and flows do this before they start DVC.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

import psutil
import yaml

from flows import dvc
from tasks.runtime import atomic, locks, workspace
from tasks.runtime.errors import StageError

LOCK = "dvc.lock"
ENTRIES = Path(".dvc") / "tmp" / "rwlock"
"""DVC's list of the commands that read and write outputs."""
GUARD = Path(".dvc") / "tmp" / "rwlock.lock"
"""DVC holds it by `flock` while it changes the list."""


def main() -> None:
    argparse.ArgumentParser(prog="python -m flows.recover", description=__doc__).parse_args()
    try:
        done = recover(workspace.root())
    except StageError as error:
        sys.exit(f"recover: error: {error}")
    print("\n".join(f"recover: {each}" for each in done or ["nothing to repair"]))


def recover(folder: Path) -> list[str]:
    """Repair DVC's files in the work tree `folder`; returns a sentence for each repair.

    Commands that are at work keep their entries, so this may be called at any time. Raises `StageError` if a file
    cannot be written.
    """
    if not (folder / ".dvc").is_dir():
        return []
    try:
        return [repair for repair in (_release(folder), _restore(folder)) if repair]
    except OSError as error:
        raise StageError(
            f"DVC's files need repair, and {error.strerror}; correct this, then run the same again"
        ) from None


def _release(folder: Path) -> str | None:
    """Remove the entries of commands that have ended; returns what was done."""
    path = folder / ENTRIES
    if not path.is_file():
        return None
    with locks.exclusive(folder / GUARD):
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))
            readers, writers = dict(listed.get("read", {})), dict(listed.get("write", {}))
            pids = {_pid(entry) for entry in [*itertools.chain(*readers.values()), *writers.values()]}
        except (ValueError, KeyError, TypeError, AttributeError):
            path.unlink()
            return f"{ENTRIES} was cut off by a kill, and is removed"
        ended = {pid for pid in pids if not _works_in(folder, pid)}
        if not ended:
            return None
        reading = {name: [each for each in entries if _pid(each) not in ended] for name, entries in readers.items()}
        writing = {name: entry for name, entry in writers.items() if _pid(entry) not in ended}
        left = {"write": writing, "read": {name: entries for name, entries in reading.items() if entries}}
        atomic.write_text(path, json.dumps(left))
    return f"released the locks of processes that have ended: {', '.join(map(str, sorted(ended)))}"


def _pid(entry: dict[str, str]) -> int:
    return int(entry["pid"])


def _works_in(folder: Path, pid: int) -> bool:
    """Whether a process is a DVC command of the work tree: DVC's folder is the work tree, or one inside it."""
    try:
        process = psutil.Process(pid)
        here = Path(process.cwd()).resolve()
        return process.status() != psutil.STATUS_ZOMBIE and here.is_relative_to(folder.resolve())
    except psutil.NoSuchProcess:
        return False
    except (psutil.AccessDenied, OSError):
        return True  # of another user: it may be one


def _restore(folder: Path) -> str | None:
    """Replace a `dvc.lock` that DVC cannot read by the committed one; returns what was done."""
    path = folder / LOCK
    if not path.is_file() or is_whole(path.read_bytes()):
        return None
    asked = dvc.command("dag", "--dot")
    read = subprocess.run(asked, cwd=folder, capture_output=True, text=True, check=False)
    if read.returncode == 0 or LOCK not in read.stderr:
        return None  # DVC reads it, or has another error to report
    committed = subprocess.run(["git", "show", f"HEAD:./{LOCK}"], cwd=folder, capture_output=True, check=False)
    if committed.returncode == 0 and is_whole(committed.stdout):
        atomic.write_bytes(path, committed.stdout)
        became = "is replaced by the committed one"
    else:
        path.unlink()
        became = "is removed"
    return f"{LOCK} was cut off by a kill, and {became}; DVC takes the results from its cache"


def is_whole(data: bytes) -> bool:
    """Whether the content of a `dvc.lock` is surely one that DVC can read; quicker than to ask DVC."""
    if data and not data.endswith(b"\n"):
        return False
    try:
        document = yaml.load(data, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}  # noqa: S506 - both are safe
    except (yaml.YAMLError, UnicodeDecodeError):
        return False
    stages = document.get("stages", {}) if isinstance(document, dict) else None
    return isinstance(stages, dict) and all(map(_is_stage, stages.values()))


def _is_stage(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("cmd"), str | list):
        return False
    files, params = [entry.get(name, []) for name in ("deps", "outs")], entry.get("params", {})
    return (
        all(isinstance(rows, list) and all(map(_is_file, rows)) for rows in files)
        and isinstance(params, dict)
        and all(isinstance(values, dict) for values in params.values())
    )


def _is_file(row: object) -> bool:
    return isinstance(row, dict) and isinstance(row.get("path"), str) and None not in row.values()


if __name__ == "__main__":
    main()
