"""The code that a source file depends on: the files that it imports or opens by name, directly or not.

They are read from the syntax trees, which takes milliseconds and imports nothing. `PLUMBING`, which cannot change the
bytes of an output, is left out. `dvc.yaml` lists these files as dependencies of a stage, and the key of a training run
hashes them.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path

from models.hashing import file_sha256

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("tasks", "models")
NAMED = (*PACKAGES, "mlflow")
"""Folders whose files a module may open by name, such as a page template."""

# These files start a stage, log and check; they do not affect the bytes of its outputs. A stage that depended on them
# would run again for a better error message. The parameters themselves are dependencies through `params.yaml`.
PLUMBING = {
    "models/__init__.py",
    "models/device.py",
    "models/hashing.py",
    "models/json_files.py",
    "models/parallel.py",
    "tasks/__init__.py",
    "tasks/params",
    "tasks/runtime/atomic.py",
    "tasks/runtime/closure.py",
    "tasks/runtime/cluster.py",
    "tasks/formats/verdict.py",
    "tasks/runtime/codec_quality.py",
    "tasks/runtime/consistency.py",
    "tasks/runtime/disk.py",
    "tasks/runtime/errors.py",
    "tasks/runtime/integrity.py",
    "tasks/runtime/leash.py",
    "tasks/runtime/locks.py",
    "tasks/runtime/loopback.py",
    "tasks/runtime/parent.py",
    "tasks/runtime/arithmetic.py",
    "tasks/runtime/progress.py",
    "tasks/runtime/run_labels.py",
    "tasks/runtime/stage.py",
    "tasks/runtime/stage_file.py",
    "tasks/runtime/store.py",
    "tasks/runtime/tracking.py",
    "tasks/runtime/workspace.py",
}


def closure(*starts: str, without: Collection[str] = (), plumbing: Collection[str] = PLUMBING) -> list[str]:
    """Return the files `starts` and all files that they import or name, directly or not.

    Args:
        starts: Paths relative to the root of the project.
        without: Files that are not followed.
        plumbing: More files and folders that are not followed.

    Returns:
        Sorted paths relative to the root of the project.

    Raises:
        FileNotFoundError: if a named file or an imported module of the project does not exist.
    """
    for name in (*starts, *without):
        if not (ROOT / name).is_file():
            raise FileNotFoundError(f"{name} does not exist; correct the list that names it")
    found: set[str] = set()
    waiting = list(starts)
    while waiting:
        file = waiting.pop()
        if file in found or file in without or _is_in(file, plumbing) or _is_empty(file):
            continue
        found.add(file)
        if file.endswith(".py"):
            waiting += _read_by(file)
    return sorted(found)


def _is_in(file: str, listed: Collection[str]) -> bool:
    """Whether `file` or its folder is listed."""
    return file in listed or file.rpartition("/")[0] in listed


def _is_empty(file: str) -> bool:
    """Whether `file` only marks a package."""
    return file.endswith("__init__.py") and not (ROOT / file).stat().st_size


def hashes(files: Collection[str]) -> dict[str, str]:
    """Return path -> SHA-256 of each file, sorted by path."""
    return {file: file_sha256(ROOT / file) for file in sorted(files)}


def digest(*starts: str) -> str:
    """Return one SHA-256 over the paths and contents of the closure of `starts`."""
    return hashlib.sha256(json.dumps(hashes(closure(*starts))).encode()).hexdigest()


def _read_by(file: str) -> list[str]:
    """Files of the project that `file` imports outside of TYPE_CHECKING, or whose name it contains as a string."""
    modules, texts = _syntax((ROOT / file).read_text(encoding="utf-8"), Path(file).parent.parts)
    imported = [path for module in modules for path in _file_of(module, file)]
    named = [path for path in _files() if path.rpartition("/")[2] in texts]
    page = file.removesuffix(".py") + ".html"
    return [*imported, *named, *([page] if (ROOT / page).is_file() else [])]


@functools.cache  # the text is the key: a process that trains twice parses each version of a file once
def _syntax(text: str, package: tuple[str, ...]) -> tuple[list[tuple[str, str | None]], set[str]]:
    """The imports and the strings of a file in `package` with this text."""
    tree = ast.parse(text)
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return list(_imports(tree, package)), texts - {"__init__.py"}


@functools.cache
def _files() -> list[str]:
    return [path.relative_to(ROOT).as_posix() for folder in NAMED for path in sorted((ROOT / folder).rglob("*.*"))]


def _imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[str, str | None]]:
    """(module, name imported from it) of every import in the syntax tree of a file in `package`, also in functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join((*above, *([node.module] if node.module else [])))
            yield from ((base, alias.name) for alias in node.names)
        yield from _imports(node, package)


def _file_of(imported: tuple[str, str | None], by: str) -> list[str]:
    """The file of an imported module of the project, [] for other packages."""
    module, name = imported
    if module.partition(".")[0] not in PACKAGES:
        return []
    base = module.replace(".", "/")
    paths = [f"{base}.py", f"{base}/__init__.py", *([f"{base}/{name}.py"] if name else [])]
    existing = [path for path in paths if (ROOT / path).is_file()]
    if not existing:
        raise FileNotFoundError(f"{by} imports {module}{f'.{name}' if name else ''}, which has no file; correct that")
    return existing
