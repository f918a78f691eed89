"""Files compared with the SHA-256 that was recorded when they were written.

`dvc repro` trusts a file whose size and modification time did not change, but a damaged file can keep both. Therefore a
stage compares the files that it opens with the checksums in the index beside them. A large dataset is compared once:
the state of its files (inode, size, times) is kept in the scratch folder. It contains the time of the last status
change, which no program can set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias, TypeVar

from models import json_files
from models.hashing import file_sha256
from models.json_files import Description, JsonObject
from tasks.runtime import atomic, workspace
from tasks.runtime.errors import StageError
from tasks.runtime.progress import progress

State: TypeAlias = list[int | str]
"""Device, inode, size, modification time and status change time of a file, and its SHA-256."""

AnyDescription = TypeVar("AnyDescription", bound=Description)
VERIFIED = "verified.json"
REMEMBERED_BYTES = 256 << 20
"""Files of fewer bytes in total are compared by every process, which takes less than a second."""
_compared: dict[str, State] = {}
"""Path -> state of the files that this process compared."""


def checksums(folder: Path, pattern: str = "*") -> dict[str, str]:
    """Return relative path -> SHA-256 of the files below `folder` that match `pattern`."""
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def require(folder: Path, sha256: Mapping[str, str], stage: str, fix: str | None = None) -> None:
    """Compare the files of `folder` with their SHA-256, by relative path.

    Only the first process of a machine compares.

    Raises:
        StageError: for the first file that differs; names the command by which `stage` writes it again, or `fix`.
    """
    fix = fix or remedy(stage)
    if int(os.environ.get("LOCAL_RANK", "0")):
        return
    wanted = {folder / name: expected for name, expected in sha256.items()}
    for file in wanted:
        if not file.is_file():
            raise StageError(f"{file} is missing; {fix}")
    states: dict[str, State] = {_name(file): [*_state(file), expected] for file, expected in wanted.items()}
    large = sum(file.stat().st_size for file in wanted) > REMEMBERED_BYTES
    known = _compared | (_remembered() if large else {})
    unknown = [file for file in wanted if known.get(_name(file)) != states[_name(file)]]
    if not unknown:
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = pool.map(file_sha256, unknown)
        bar = progress(hashes, desc=f"verify {folder}", total=len(unknown), unit="file", delay=2)
        for file, found in zip(unknown, bar, strict=True):
            if found != wanted[file]:
                raise StageError(f"{file} is damaged: its sha256 is not the one that was recorded; {fix}")
    _compared.update(states)
    if large:
        _remember(states)


def read_described(folder: Path, name: str, stage: str) -> JsonObject:
    """Return the JSON object `name` that describes `folder`, after comparing the files that it lists under "files".

    Raises `StageError` if the description is missing or damaged, or if a file differs.
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


def read_json(file: Path, stage: str) -> JsonObject:
    """Return the JSON object in a file that `stage` wrote. Raises `StageError` if it is missing or damaged."""
    try:
        value = json_files.read_json(file)
    except FileNotFoundError:
        raise StageError(f"{file.parent} holds no {file.name}; run 'dvc repro {stage}'") from None
    except ValueError as error:
        raise StageError(f"{file} is damaged ({error}); {remedy(stage)}") from None
    if not isinstance(value, dict):
        raise StageError(f"{file} is damaged: it holds no JSON object; {remedy(stage)}")
    return value


def read_description(kind: type[AnyDescription], file: Path, stage: str) -> AnyDescription:
    """Read a typed description that `stage` wrote.

    Raises `StageError` if the file is missing, damaged or of another format.
    """
    read_json(file, stage)  # raises the errors of missing and damaged files
    try:
        return kind.read(file)
    except (TypeError, KeyError, AttributeError) as error:
        raise StageError(f"{file} is damaged ({error}); {remedy(stage)}") from None
    except ValueError as error:
        raise StageError(str(error)) from None


def remedy(stage: str) -> str:
    """Return the end of an error message: the command by which `stage` writes its outputs again.

    Without -f, DVC skips a stage whose files kept their size and time; without -s, it would also run all stages before.
    """
    return f"run 'dvc repro -f -s {stage}', which writes it anew, then 'dvc repro'"


def _name(file: Path) -> str:
    return str(file.resolve())


def _state(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _remembered() -> dict[str, State]:
    try:
        known = json_files.read_json(workspace.scratch() / VERIFIED)
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(new: dict[str, State]) -> None:
    """Add states to the scratch folder and drop files that no longer exist.

    Of two processes that write at once, one may lose an entry, which costs one more comparison.
    """
    kept = {name: state for name, state in _remembered().items() if Path(name).is_file()}
    with suppress(OSError):  # on a full or read-only disk the files are compared again next time
        atomic.write_json(workspace.scratch() / VERIFIED, kept | new)
