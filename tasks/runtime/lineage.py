"""Where a model came from: the state of code, data and stages, as JSON that is kept with it in MLflow.

Not part of any file that a stage reads: the same model may come from two commits.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tasks.params.redaction import holds_credentials, redacted, redacted_values

TAG_CHARACTERS = 500
FLOW_RUN = "AFTERIMAGE_FLOW_RUN_ID"
DIFF_CHARACTERS = 200_000
CODE = (
    *("flows/", "infra/", "mlflow/", "models/", "tasks/"),
    *("Makefile", "dvc.yaml", "params.yaml", "prefect.yaml", "pyproject.toml", "requirements.lock"),
)
"""Folders and files whose uncommitted changes are recorded; those of other files are named and left out."""
NOT_CODE = "neither code nor parameters"
NO_SCANNER = "not scanned for secrets, because the package detect-secrets is not installed"
# Checksums are everywhere in code and parameters, and a random hexadecimal string looks like one; an IP address grants
# no access.
NOISY_DETECTORS = ("HexHighEntropyString", "IPPublicDetector")
# `dvc.lock` is recorded beside the diff, and is being written while this is read.
_ELSEWHERE = ("--", ".", ":(exclude)dvc.lock")
# What comes after the weights, or is being run while this is read.
NOT_UPSTREAM = ("register",)


def git_commit() -> str | None:
    """The commit that is checked out here, or None outside a git repository or without a commit."""
    return _git("rev-parse", "HEAD") or None


def flow_run() -> str | None:
    """Id of the Prefect flow run that this process works for, if any."""
    return os.environ.get(FLOW_RUN) or None


def lineage(data_sha256: str) -> dict[str, Any]:
    """Git commit, whether the work tree differs from it and how (code and parameters, scanned for secrets), the entries
    of `dvc.lock` with their hash, the data's content hash, the Prefect flow run. What is not there is null."""
    stages = redacted_values(_upstream(Path("dvc.lock")))
    diff, is_cut, left_out = _changes()
    return {
        "git": {
            "commit": git_commit(),
            "dirty": bool(_git("status", "--porcelain", "--untracked-files=normal", *_ELSEWHERE)),
            "diff": diff,
            "diff_is_cut": is_cut,
            "left_out": left_out,
        },
        "dvc": {"stages": stages, "sha256": _digest(stages) if stages is not None else None},
        "data_sha256": data_sha256,
        "prefect_flow_run": flow_run(),
    }


def _changes() -> tuple[str, bool, dict[str, str]]:
    """The uncommitted changes of `CODE` as a diff, whether it was cut, and what it leaves out: path -> reason.

    A file in whose changes a secret is found is left out as a whole, and so is everything where nothing can be scanned.
    """
    names = [name for name in (_git("diff", "HEAD", "--name-only", "-z", *_ELSEWHERE) or "").split("\0") if name]
    code = [name for name in names if any(name == part or (part[-1] == "/" and name.startswith(part)) for part in CODE)]
    left_out = {redacted(name): NOT_CODE for name in names if name not in code}
    if importlib.util.find_spec("detect_secrets") is None:
        return "", False, left_out | dict.fromkeys(code, NO_SCANNER)
    options = ("--no-color", "--no-ext-diff", "--no-textconv", "--no-renames")
    diffs = {name: _git("diff", "HEAD", *options, "--", f":(top,literal){name}") or "" for name in code}
    kept, is_cut = _cut(diffs)
    found = dict(_secrets(kept)) if kept else {}
    left_out |= {redacted(name): f"holds what looks like a secret ({kind})" for name, kind in found.items()}
    return "\n".join(diff for name, diff in kept.items() if name not in found), is_cut, left_out


def _cut(diffs: dict[str, str]) -> tuple[dict[str, str], bool]:
    """The first `DIFF_CHARACTERS` of all diffs together, in whole lines, and whether anything was cut."""
    kept, room = {}, DIFF_CHARACTERS
    for name, diff in diffs.items():
        kept[name] = diff if len(diff) <= room else diff[:room].rpartition("\n")[0]
        room -= len(kept[name]) + 1
        if kept[name] != diff:
            return kept, True
    return kept, False


def _secrets(diffs: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(path, kind) of each diff in which a secret is found, in added, removed or unchanged lines."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.core.scan import scan_file
    from detect_secrets.settings import transient_settings

    detectors = {detector.__name__ for detector in get_mapping_from_secret_type_to_class().values()}
    settings = {"plugins_used": [{"name": name} for name in sorted(detectors.difference(NOISY_DETECTORS))]}
    with tempfile.TemporaryDirectory() as folder, transient_settings(settings):
        for name, diff in diffs.items():
            text = "\n".join(dict.fromkeys(line[1:] for line in diff.splitlines()))  # each line once
            kinds: list[str] = ["credentials in an address"] if holds_credentials(text) else []
            # What counts as a secret depends on the suffix: unquoted values do in configuration files alone.
            for suffix in {Path(name).suffix, ".yaml"}:
                copy = Path(folder) / f"changes{suffix}"
                copy.write_text(text, encoding="utf-8")
                kinds += _kinds(scan_file(str(copy)))
            if kinds:
                yield name, ", ".join(sorted(set(kinds)))


def _kinds(found: Iterable[Any]) -> list[str]:
    return [str(secret.type) for secret in found]


def tags(facts: dict[str, Any]) -> dict[str, str]:
    """The parts of a lineage that fit into a tag."""
    values = {
        "git_commit": facts["git"]["commit"],
        "git_dirty": str(facts["git"]["dirty"]).lower() if facts["git"]["commit"] else None,
        "dvc_lock_sha256": facts["dvc"]["sha256"],
        "data_sha256": facts["data_sha256"],
        "prefect_flow_run": facts["prefect_flow_run"],
        "git_diff_left_out": ", ".join(sorted(facts["git"]["left_out"]))[:TAG_CHARACTERS] or None,
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
