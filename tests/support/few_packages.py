"""A Python that has only some packages and what they require, as many images for GPUs have."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def link(folder: Path, packages: Iterable[str]) -> None:
    """Link the installed packages, and those that they require, into `folder`."""
    for distribution in _closure(packages):
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}
        for top in tops - {"__pycache__"}:
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and not (folder / top).exists():
                (folder / top).symlink_to(source)


def python(folder: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment of a Python that finds the packages of `folder` and this project."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    return [sys.executable, "-S", *arguments], environment | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def _closure(packages: Iterable[str]) -> list[importlib.metadata.Distribution]:
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = list(packages)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a requirement of another platform
        required = [Requirement(text) for text in found[name].requires or ()]
        waiting += [r.name for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    return list(found.values())
