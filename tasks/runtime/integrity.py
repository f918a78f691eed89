"""Files against the checksums that were written with them.

`dvc repro` trusts a file whose size and time of modification did not change, and a file that a disk or a program
damaged may keep both. So a stage compares what it opens with the sha256 that stands in the index beside it. A large
data set is compared once: its files are remembered in the scratch folder by inode, size and times, among them the time
of the last status change, which no program can set.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tasks.runtime import atomic, workspace
from tasks.runtime.disk import sha256_of
from tasks.runtime.stage import StageError

VERIFIED = "verified.json"
REMEMBERED_BYTES = 256 << 20
"""Files that are smaller together are compared in every process: it takes less than a second."""
_compared: dict[str, list[Any]] = {}
"""Path -> state and sha256, of the files that this process compared."""


def checksums(folder: Path, pattern: str = "*") -> dict[str, str]:
    """Relative path -> sha256 of the files below `folder` that match `pattern`."""
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def require(folder: Path, sha256: Mapping[str, str], stage: str) -> None:
    """Compare files of `folder` with their `sha256`. Raises `StageError` that names the first that differs, and the
    command by which `stage`, which wrote them, writes them anew."""
    if int(os.environ.get("LOCAL_RANK", "0")):
        return  # of several processes of one machine the first compares
    wanted = {folder / name: expected for name, expected in sha256.items()}
    for file in wanted:
        if not file.is_file():
            raise StageError(f"{file} is missing; {remedy(stage)}")
    states = {_name(file): [*_state(file), expected] for file, expected in wanted.items()}
    large = sum(file.stat().st_size for file in wanted) > REMEMBERED_BYTES
    known = _compared | (_remembered() if large else {})
    unknown = [file for file in wanted if known.get(_name(file)) != states[_name(file)]]
    if not unknown:
        return
    bar = {"desc": f"verify {folder}", "total": len(unknown), "unit": "file", "dynamic_ncols": True, "delay": 2}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for file, found in zip(unknown, tqdm(pool.map(sha256_of, unknown), **bar), strict=True):
            if found != wanted[file]:
                raise StageError(f"{file} is damaged: its sha256 is not the one that was recorded; {remedy(stage)}")
    _compared.update(states)
    if large:
        _remember(states)


def read_described(folder: Path, name: str, stage: str) -> dict[str, Any]:
    """The JSON object `name` that describes `folder`, after comparing the files that it lists under "files".

    Raises `StageError` where the description is missing or cannot be read, or where a file differs.
    """
    description = read_json(folder / name, stage)
    require(folder, description.get("files", {}), stage)
    return description


@contextmanager
def loading(folder: Path, name: str, stage: str) -> Iterator[None]:
    """Load what `folder` holds inside this block, after comparing its files with `name`, which describes it.

    Raises:
        StageError: as `read_described` does, and in place of a `ValueError` of the loader, such as an unknown format.
    """
    read_described(folder, name, stage)
    try:
        yield
    except ValueError as error:
        raise StageError(str(error)) from None


def read_json(file: Path, stage: str) -> dict[str, Any]:
    """The JSON object in a file that `stage` wrote. Raises `StageError` where it is missing or cannot be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{file.parent} holds no {file.name}; run 'dvc repro {stage}'") from None
    except ValueError as error:
        raise StageError(f"{file} is damaged ({error}); {remedy(stage)}") from None
    if not isinstance(value, dict):
        raise StageError(f"{file} is damaged: it holds no JSON object; {remedy(stage)}")
    return value


def remedy(stage: str) -> str:
    """How to have `stage` write its outputs anew. Without -f, DVC takes a file that kept its size and time for
    unchanged; without -s, it would run everything before the stage as well."""
    return f"run 'dvc repro -f -s {stage}', which writes it anew, then 'dvc repro'"


def _name(file: Path) -> str:
    return str(file.resolve())


def _state(file: Path) -> list[int]:
    its = file.stat()
    return [its.st_dev, its.st_ino, its.st_size, its.st_mtime_ns, its.st_ctime_ns]


def _remembered() -> dict[str, list[Any]]:
    try:
        known: dict[str, list[Any]] = json.loads((workspace.scratch() / VERIFIED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(new: dict[str, list[Any]]) -> None:
    """Add to what is remembered, without files that no longer exist. Two processes at once may lose an entry, which
    costs one more comparison."""
    kept = {name: state for name, state in _remembered().items() if Path(name).is_file()}
    with suppress(OSError):  # a disk that is full or read-only costs only time
        atomic.write_json(workspace.scratch() / VERIFIED, kept | new)
