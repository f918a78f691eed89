"""Every command answers `--help` at once, and asking changes nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import cpu, tiny

ROOT = Path(__file__).resolve().parents[2]
MOST_SECONDS = 1.0
"""Of computing, not of waiting: others may use the machine."""


def commands() -> dict[str, list[str]]:
    """Every file with a `__main__` part -> how it is started."""
    found: dict[str, list[str]] = {}
    for folder in ("flows", "infra", "models", "tasks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT)
            if not re.search(r'^if __name__ == "__main__":', path.read_text(encoding="utf-8"), re.M):
                continue
            module = ".".join(name.with_suffix("").parts).removesuffix(".__main__")
            # The leash and the installer are started by their path, because they run in an isolated or a bare Python.
            alone = path.name in ("leash.py", "install.py")
            found[str(name)] = [sys.executable, *(["-I", "-B", str(name)] if alone else ["-m", module])]
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files, in which a file that appears or changes is seen whoever else works on the tree."""
    copy = tmp_path_factory.mktemp("help")
    names = tiny.git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in names:
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    tiny.copy_bytecode({Path(name).parent for name in names if name.endswith(".py")}, copy)
    return copy


@pytest.fixture(scope="module")
def untouched(tree: Path) -> dict[str, tuple[int, int]]:
    return files(tree)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below `folder` -> when it was last written, and its size."""
    found = {}
    for top, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = os.path.join(top, name)  # noqa: PTH118  # fifty times thousands of files
            status = os.stat(path)  # noqa: PTH116
            found[path] = (status.st_mtime_ns, status.st_size)
    return found


@pytest.mark.parametrize("name", commands())
def test_help_is_quick_and_changes_nothing(name: str, tree: Path, untouched: dict[str, tuple[int, int]]) -> None:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*commands()[name], "--help"]
    with cpu.at_most(MOST_SECONDS):
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: "), done.stdout[:200]
    assert done.stderr == ""
    assert files(tree) == untouched
