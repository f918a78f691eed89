"""The code of a model version: its commit in a temporary clone, with the changes that were not committed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.params.redaction import redacted
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from models.json_files import JsonObject


def git(folder: Path, *arguments: str, given: str | None = None) -> str:
    """Return the output of a Git command in `folder`. Raises `StageError` with Git's message if it fails."""
    # In a Git hook these variables name the repository of the hook.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise StageError(f"git {arguments[0]} failed in {folder}: {' '.join(done.stderr.split())}")
    return done.stdout.rstrip("\n")


def check_out(repository: Path, commit: str, folder: Path) -> None:
    """Make a clone of `repository` at `commit` in `folder`, which must not exist.

    Raises:
        StageError: if the repository lacks the commit.
    """
    git(repository, "cat-file", "-e", f"{commit}^{{commit}}")
    git(repository, "clone", "--quiet", "--shared", "--no-checkout", str(repository), str(folder))
    git(folder, "checkout", "--quiet", "--detach", commit)


def apply_changes(folder: Path, recorded: JsonObject) -> None:
    """Apply the changes that `lineage.lineage` recorded as `git` to a clone at its commit.

    Raises:
        StageError: if Git cannot apply them, for example because the record was cut.
    """
    if recorded["diff"]:
        git(folder, "apply", "--whitespace=nowarn", "-", given=str(recorded["diff"]) + "\n")


def share_dvc_settings(root: Path, folder: Path, cache: Path) -> None:
    """Give a clone the DVC settings of the work tree `root`, such as its remotes, and the folder of a cache.

    Raises:
        StageError: if DVC refuses.
    """
    for name in ("config", "config.local"):
        if (root / ".dvc" / name).is_file():
            shutil.copyfile(root / ".dvc" / name, folder / ".dvc" / name)
    dvc(folder, "config", "--local", "cache.dir", str(cache))


def dvc(folder: Path, *arguments: str) -> str:
    """Return the output of a DVC command in `folder`. Raises `StageError` with its last error if it fails."""
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or [done.stderr.strip()]
        raise StageError(f"dvc {arguments[0]} failed in {folder}: {redacted(errors[-1].removeprefix('ERROR: '))}")
    return done.stdout
