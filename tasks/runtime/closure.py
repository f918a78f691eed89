"""Source files that a source file depends on, read from syntax trees: nothing is imported, and it takes milliseconds.

`dvc.yaml` lists these files as dependencies of a stage, and the key of a training run hashes them.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("tasks", "models")
NAMED = (*PACKAGES, "mlflow")
"""Folders whose files a module may read by name, such as a page template."""

# How a stage starts, where files lie, what is logged and checked: none of it decides which bytes come out, and a stage
# that depended on them would train again for a better error message. What they decide is in `params.yaml`.
PLUMBING = {
    "models/__init__.py",
    "models/device.py",
    "models/hashing.py",
    "models/json_files.py",
    "tasks/__init__.py",
    "tasks/runtime/atomic.py",
    "tasks/runtime/closure.py",
    "tasks/runtime/consistency.py",
    "tasks/runtime/disk.py",
    "tasks/runtime/integrity.py",
    "tasks/runtime/leash.py",
    "tasks/runtime/locks.py",
    "tasks/runtime/loopback.py",
    "tasks/params/__init__.py",
    "tasks/runtime/parent.py",
    "tasks/runtime/redaction.py",
    "tasks/runtime/run_labels.py",
    "tasks/runtime/stage.py",
    "tasks/runtime/store.py",
    "tasks/runtime/tracking.py",
    "tasks/runtime/workspace.py",
}


def closure(*starts: str, without: Collection[str] = (), plumbing: Collection[str] = PLUMBING) -> list[str]:
    """The files `starts`, what they import or name, what that imports, and so on; sorted paths from the project's root.

    Does not enter the files in `plumbing` or in `without`. Raises `FileNotFoundError` if one of the named files or an
    imported module of the project does not exist.
    """
    for name in (*starts, *without):
        if not (ROOT / name).is_file():
            raise FileNotFoundError(f"{name} does not exist; correct the list that names it")
    found: set[str] = set()
    waiting = list(starts)
    while waiting:
        file = waiting.pop()
        if file in found or file in plumbing or file in without or _is_empty(file):
            continue
        found.add(file)
        if file.endswith(".py"):
            waiting += _read_by(file)
    return sorted(found)


def _is_empty(file: str) -> bool:
    """Whether `file` only marks a package."""
    return file.endswith("__init__.py") and not (ROOT / file).stat().st_size


def hashes(files: Collection[str]) -> dict[str, str]:
    """sha256 of each file, sorted by path."""
    return {file: hashlib.sha256((ROOT / file).read_bytes()).hexdigest() for file in sorted(files)}


def digest(*starts: str) -> str:
    """One sha256 over the paths and contents of the closure of `starts`."""
    return hashlib.sha256(json.dumps(hashes(closure(*starts))).encode()).hexdigest()


def _read_by(file: str) -> list[str]:
    """Files of the project that `file` imports, outside of TYPE_CHECKING, or names in order to read them."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    imported = [path for module in _imports(tree, Path(file).parts[0]) for path in _file_of(module, file)]
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    texts.discard("__init__.py")
    named = [path for path in _files() if path.rpartition("/")[2] in texts]
    page = file.removesuffix(".py") + ".html"
    return [*imported, *named, *([page] if (ROOT / page).is_file() else [])]


@functools.cache
def _files() -> list[str]:
    return [path.relative_to(ROOT).as_posix() for folder in NAMED for path in sorted((ROOT / folder).rglob("*.*"))]


def _imports(tree: ast.AST, package: str) -> Iterator[tuple[str, str | None]]:
    """(module, name imported from it) of every import in a syntax tree, wherever it stands."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(part for part in (package if node.level else "", node.module or "") if part)
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
