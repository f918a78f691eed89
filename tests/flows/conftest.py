"""The tiny chain that the tests of this folder share."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.shared import made_once


@dataclass(frozen=True)
class Chain:
    """A tiny work tree in which `make repro` has run once."""

    tree: Path
    output: str
    """What `make repro` printed."""
    cache: Path
    """The DVC cache as that run left it; a copy of it makes another tree find all results."""


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path) -> Chain:
    folder = made_once(tmp_path_factory, "chain", lambda folder: _run_chain(folder, migrated_database))
    return Chain(folder / "tree", (folder / "output.txt").read_text(encoding="utf-8"), folder / "cache")


def _run_chain(folder: Path, database: Path) -> None:
    tree = tiny.tree(folder / "tree")
    shutil.copy(database, tree / "mlflow.db")  # migrated by the same function that the stages call
    (folder / "output.txt").write_text(tiny.run(tree, "infra.run"), encoding="utf-8")
    shutil.copytree(tree / ".dvc" / "cache", folder / "cache")
