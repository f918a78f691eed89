"""The clone in which a deployment works, and the lock that keeps two runs out of one workspace.

A clone follows the committed state of the main work tree and shares its DVC cache, its MLflow store and its
scratch folder. A run writes nothing else in the main work tree.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flows import dvc
from tasks import params
from tasks.runtime import atomic
from tasks.runtime.errors import StageError

Log = Callable[[str], None]

LOCK = Path(".prefect") / "run.lock"
CLONES = Path(".prefect") / "workspaces"
POLL_SECONDS = 0.5
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


def folder(root: Path, name: str) -> Path:
    """Folder of the clone `name` of the work tree `root`; it need not exist. Raises `StageError` for a bad name."""
    if not NAME.fullmatch(name):
        raise StageError(f"workspace {name!r} is not a valid name; use lower-case letters, digits and hyphens")
    return root / CLONES / name


@contextmanager
def only_run(workspace: Path, who: str, wait_seconds: float, log: Log) -> Iterator[int]:
    """Lock the workspace; yields the descriptor of the lock, which child processes inherit.

    Waits up to `wait_seconds` for another run, then raises `StageError`. The kernel releases the lock when the last
    process that has the descriptor open ends or is killed.

    Args:
        workspace: Folder to lock.
        who: Name of this run in the messages of waiting runs.
        wait_seconds: Limit of the waiting.
        log: Receives one line if this run has to wait.
    """
    path = workspace / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _wait_for(descriptor, workspace, wait_seconds, log)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{who} (process {os.getpid()})".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, workspace: Path, wait_seconds: float, log: Log) -> None:
    deadline = time.monotonic() + wait_seconds
    logged = False
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another run"
        if time.monotonic() >= deadline:
            raise StageError(
                f"{holder} uses {workspace} and did not end within {wait_seconds:.0f} s; cancel it or try again later"
            )
        if not logged:
            log(f"{holder} uses {workspace}; waiting up to {wait_seconds:.0f} s for it to finish")
            logged = True
        time.sleep(POLL_SECONDS)


def update(root: Path, clone: Path, preset: str | None, overrides: Sequence[str], log: Log) -> None:
    """Bring `clone` to the commit that `root` has checked out; the caller holds `only_run(clone)`.

    Its `params.yaml` is the committed one or, with `preset`, that preset with `overrides` (`key=value`).
    Raises `StageError` if nothing is committed or the preset does not exist.
    """
    if overrides and preset is None:
        raise StageError("overrides change a preset; name one as well (parameter `preset`)")
    commit = git(
        root, "rev-parse", "HEAD^{commit}", hint=f"{root} has no commit; a deployment runs the committed state"
    )
    if not (clone / ".git").exists():
        log(f"making a clone of {root} in {clone}")
        git(clone, "init", "--quiet")
    git(clone, "fetch", "--quiet", "--no-tags", "--update-shallow", str(root), "HEAD")
    git(clone, "checkout", "--quiet", "--force", "--detach", "FETCH_HEAD")
    changed = [line[3:] for line in git(root, "status", "--porcelain").splitlines()]
    if changed := [name for name in changed if name != "dvc.lock"]:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        log(f"not committed, so not used: {', '.join(changed[:3])}{more}")
    _share_cache(root, clone)
    if preset is not None:
        compose(clone, preset, overrides)
    _check_source(root, clone)
    log(f"working on commit {commit[:12]} in {clone}")


def committed_params(root: Path) -> str:
    """Text of the committed params.yaml of `root`; empty if none is committed."""
    try:
        return git(root, "show", "HEAD:./params.yaml")
    except StageError:
        return ""


def git(where: Path, *arguments: str, hint: str | None = None) -> str:
    """Output of a Git command in `where`. Raises `StageError` with `hint`, or else with the message of Git."""
    # In a Git hook these variables name the repository of the hook.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", "-C", str(where), *arguments], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise StageError(hint or f"git {arguments[0]} failed in {where}: {' '.join(done.stderr.split())}")
    return done.stdout.rstrip("\n")


def cache(root: Path) -> Path:
    """Folder of the DVC cache of the work tree `root`. Raises `StageError` if DVC does not work there."""
    done = subprocess.run(dvc.command("cache", "dir"), cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageError(f"DVC does not work in {root}: {' '.join(done.stderr.split())}")
    return (root / done.stdout.strip()).resolve()


def _share_cache(root: Path, clone: Path) -> None:
    """Have the clone use the cache and the remotes of the main work tree: nothing there is computed again."""
    shared = cache(root)
    own = root / ".dvc" / "config.local"
    if own.is_file():  # it may name a remote, with the place of its credentials
        shutil.copy(own, clone / ".dvc" / "config.local")
        subprocess.run(dvc.command("cache", "dir", "--local", str(shared)), cwd=clone, capture_output=True, check=True)
    else:
        atomic.write_text(clone / ".dvc" / "config.local", f'[cache]\n    dir = "{shared}"\n')
    # A killed DVC leaves its entry in this file, and an unrelated process with the same id then blocks the workspace
    # for ever. The caller holds the lock of the clone, so no running command has an entry.
    (clone / ".dvc" / "tmp" / "rwlock").unlink(missing_ok=True)


def compose(clone: Path, preset: str, overrides: Sequence[str]) -> None:
    """Write `params.yaml` of a clone from a preset and overrides (`key=value`); raises `StageError` if it cannot."""
    command = [sys.executable, "-m", "tasks.preset", preset, *overrides]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageError((done.stderr.strip().splitlines() or ["tasks.preset failed without a message"])[-1])


def _check_source(root: Path, clone: Path) -> None:
    """Raise `StageError` for a source in the main work tree that is not committed, so not in the clone."""
    path = params.load(clone / "params.yaml").download.path
    if not (clone / path).exists() and (root / path).exists():
        raise StageError(f"download.path '{path}' is not committed; commit it, or write it as an absolute path")
