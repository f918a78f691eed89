"""DVC experiments of trials: saved in the clone that computed them, fetched into the main work tree.

An experiment is a Git commit below `refs/exps/<first two digits of the baseline>/<the others>/<name>`. Its outputs
are in the cache that the clone shares, so `dvc exp show` and `dvc exp apply` of the main work tree find everything.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path

from flows import clone, dvc
from tasks.runtime.errors import StageError

_FETCHING = threading.Lock()
IDENTITY = {"NAME": "Afterimage", "EMAIL": "afterimage@localhost"}
"""Author of an experiment on a machine without a Git identity."""


def save(root: Path, folder: Path, name: str, stage: str, environment: Mapping[str, str]) -> None:
    """Save the state of the clone `folder` up to `stage` as the experiment `name`, and fetch it into `root`.

    An experiment of this name on the same commit is replaced. Raises `StageError` if DVC or Git refuse.
    """
    variables = {key: value for key, value in environment.items() if not key.startswith(("DVC_", "GIT_"))}
    variables |= {
        f"GIT_{who}_{part}": value for who in ("AUTHOR", "COMMITTER") for part, value in _identity(root).items()
    }
    command = dvc.command("exp", "save", "--force", "--name", name, stage)
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageError(f"DVC cannot save the experiment {name}: {dvc.error(done.stderr.splitlines())}")
    baseline = clone.git(folder, "rev-parse", "HEAD")
    reference = f"refs/exps/{baseline[:2]}/{baseline[2:]}/{name}"
    with _FETCHING:
        options = ("--quiet", "--no-tags", "--no-write-fetch-head", "--update-shallow")
        clone.git(root, "fetch", *options, str(folder), f"+{reference}:{reference}")


def _identity(root: Path) -> dict[str, str]:
    """Name and address of the Git user of `root`, or those of the project."""
    found = {}
    for part, default in IDENTITY.items():
        command = ["git", "-C", str(root), "config", f"user.{part.lower()}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found[part] = done.stdout.strip() or default
    return found
