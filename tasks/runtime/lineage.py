"""Where a model came from: the state of code, data and stages, as JSON that is kept with it in MLflow.

Not part of any file that a stage reads: the same model may come from two commits.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import yaml

FLOW_RUN = "AFTERIMAGE_FLOW_RUN_ID"
DIFF_CHARACTERS = 200_000
# What comes after the weights, or is being run while this is read.
NOT_UPSTREAM = ("register",)


def git_commit() -> str | None:
    """The commit that is checked out here, or None outside a git repository or without a commit."""
    return _git("rev-parse", "HEAD") or None


def flow_run() -> str | None:
    """Id of the Prefect flow run that this process works for, if any."""
    return os.environ.get(FLOW_RUN) or None


def lineage(data_sha256: str) -> dict[str, Any]:
    """Git commit, whether the work tree differs from it and how, the entries of `dvc.lock` with their
    hash, the data's content hash, the Prefect flow run. What is not there is null."""
    stages = _upstream(Path("dvc.lock"))
    # `dvc.lock` is recorded beside it, and is being written while this is read.
    elsewhere = ("--", ".", ":(exclude)dvc.lock")
    diff = _git("diff", "HEAD", *elsewhere) or ""
    return {
        "git": {
            "commit": git_commit(),
            "dirty": bool(_git("status", "--porcelain", "--untracked-files=normal", *elsewhere)),
            "diff": diff[:DIFF_CHARACTERS],
            "diff_is_cut": len(diff) > DIFF_CHARACTERS,
        },
        "dvc": {"stages": stages, "sha256": _digest(stages) if stages is not None else None},
        "data_sha256": data_sha256,
        "prefect_flow_run": flow_run(),
    }


def tags(facts: dict[str, Any]) -> dict[str, str]:
    """The parts of a lineage that fit into a tag."""
    values = {
        "git_commit": facts["git"]["commit"],
        "git_dirty": str(facts["git"]["dirty"]).lower() if facts["git"]["commit"] else None,
        "dvc_lock_sha256": facts["dvc"]["sha256"],
        "data_sha256": facts["data_sha256"],
        "prefect_flow_run": facts["prefect_flow_run"],
    }
    return {f"afterimage.{name}": value for name, value in values.items() if value is not None}


def _upstream(lock: Path) -> dict[str, Any] | None:
    if not lock.exists():
        return None
    stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages", {})
    return {name: entry for name, entry in sorted(stages.items()) if name not in NOT_UPSTREAM}


def _digest(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def _git(*arguments: str) -> str | None:
    """Output of a git command, None where git or the repository is missing."""
    try:
        result = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, errors="replace", timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
