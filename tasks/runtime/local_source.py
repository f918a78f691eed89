"""Checks of the local files that parameters name, before DVC hashes them.

DVC opens every file of a folder, including hidden ones. A dead link ends it with "[Errno 2]" only; a pipe blocks it
forever.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

from tasks.params import load
from tasks.runtime.disk import printable_name
from tasks.runtime.errors import StageError

SHOWN = 3


def require_hashable(root: Path, allow_missing: bool = False) -> None:
    """Raise `StageError` if DVC cannot hash a file that the params.yaml of the work tree `root` names.

    With `allow_missing`, a path that does not exist is accepted, as by DVC's option of that name.
    """
    params = load(root / "params.yaml")
    named = {
        "download.path": params.download.path,
        "validate.baseline": params.validation.baseline,
        "train.init_from": params.train.init_from,
    }
    for key, name in named.items():
        path = root / name
        if path.exists():
            _require_hashable(key, name, path)
        elif key != "download.path":
            raise StageError(f"{key} {name} does not exist; correct it")
        elif not allow_missing:
            raise StageError(
                f"download.path {name} does not exist on this machine; correct it, or, if the results of another "
                "machine were pushed, run 'dvc pull' and then 'dvc repro --allow-missing' instead"
            )


def _require_hashable(key: str, name: str, path: Path) -> None:
    found = list(_unhashable(path))
    if not found:
        return
    shown = "; ".join(f"{printable_name(file)}: {reason}" for file, reason in found[:SHOWN])
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    remedy = (
        "remove or replace them, or use a tar of the folder, whose unreadable files go to quarantine: "
        f"tar -cf pictures.tar -C {shlex.quote(name)} . and then {key}=pictures.tar"
        if path.is_dir()
        else "name a folder or a file"
    )
    count = f"{len(found)} file{'s' if len(found) > 1 else ''}"
    raise StageError(f"DVC cannot read {count} of {key} {name} ({shown}{more}); {remedy}")


def _unhashable(path: Path) -> Iterator[tuple[str, str]]:
    """Files below `path`, or `path` itself, that DVC cannot hash, and why."""
    if not path.is_dir():
        if reason := _reason(str(path)):
            yield str(path), reason
        return
    errors: list[OSError] = []
    for parent, folders, files in os.walk(path, onerror=errors.append):
        folders.sort()
        for file in sorted(files):
            if reason := _name_reason(os.path.relpath(parent, path), file) or _reason(f"{parent}/{file}"):
                yield os.path.relpath(f"{parent}/{file}", path), reason
    for error in errors:
        yield os.path.relpath(error.filename, path), "a folder without read permission"


def _name_reason(folder: str, file: str) -> str | None:
    """Why DVC cannot hash a file because of its name; None if it can."""
    if file == ".dvcignore":
        return "DVC reads no folder that contains such a file"
    if not f"{folder}/{file}".isascii():
        try:
            f"{folder}/{file}".encode()
        except UnicodeEncodeError:
            return "a name that is not UTF-8"
    return None


def _reason(path: str) -> str | None:
    """Why DVC cannot read a file; None if it can."""
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        return "a link in a loop" if error.errno == errno.ELOOP else "a dead link"
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return "a pipe, a socket or a device"
    allowed = os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids)
    return None if allowed else "a file without read permission"
