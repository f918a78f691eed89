"""The lineage of a model: the state of code, data and stages, stored with the model in MLflow as JSON.

It is not in any file that a stage reads, because two commits may produce the same model.
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
from typing import Protocol

import yaml

from models.json_files import JsonObject
from tasks.params.redaction import holds_credentials, redacted, redacted_values

LOCK, PARAMS = "dvc.lock", "params.yaml"
TAG_CHARACTERS = 500
FLOW_RUN = "AFTERIMAGE_FLOW_RUN_ID"
DIFF_CHARACTERS = 200_000
CODE = (
    *("flows/", "infra/", "mlflow/", "models/", "tasks/"),
    *("Makefile", "dvc.yaml", "params.yaml", "prefect.yaml", "pyproject.toml", "requirements.lock"),
)
"""Folders and files whose uncommitted changes are recorded; other changed files are only named."""
NOT_CODE = "neither code nor parameters"
NO_SCANNER = "not scanned for secrets, because the package detect-secrets is not installed"
# Code and parameters contain many checksums, which look like random hexadecimal secrets; IP addresses are not secret.
NOISY_DETECTORS = ("HexHighEntropyString", "IPPublicDetector")
# `dvc.lock` is recorded beside the diff, and DVC may be writing it now.
_ELSEWHERE = ("--", ".", ":(exclude)dvc.lock")
# Stages that run after the weights are made, or that are running now.
NOT_UPSTREAM = ("register",)


def git_commit() -> str | None:
    """Return the commit that is checked out, or None outside a Git repository or without a commit."""
    return _git("rev-parse", "HEAD") or None


def flow_run() -> str | None:
    """Return the id of the Prefect flow run that started this process, if any."""
    return os.environ.get(FLOW_RUN) or None


def lineage(data_sha256: str) -> JsonObject:
    """Return the lineage of the present work tree; values that do not exist are None.

    It contains the Git commit, the uncommitted changes of code and parameters (scanned for secrets), the entries of
    `dvc.lock` with their hash, the content hash of the data, and the Prefect flow run.
    """
    stages = redacted_values(_upstream(Path(LOCK)))
    diff, is_cut, left_out = _changes()
    return {
        "git": {
            "commit": git_commit(),
            "dirty": bool(_git("status", "--porcelain", "--untracked-files=normal", *_ELSEWHERE)),
            "diff": diff,
            "diff_is_cut": is_cut,
            "left_out": left_out,
        },
        "dvc": {"stages": stages, "sha256": digest(stages) if stages is not None else None},
        "data_sha256": data_sha256,
        "prefect_flow_run": flow_run(),
    }


def _changes() -> tuple[str, bool, dict[str, str]]:
    """Uncommitted changes of `CODE` as a diff, whether it was cut, and the files that it omits: path -> reason.

    A file whose changes contain a secret is omitted, and so is every file if the scanner is not installed.
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
    left_out |= {redacted(name): f"contains a possible secret ({kind})" for name, kind in found.items()}
    return "\n".join(diff for name, diff in kept.items() if name not in found), is_cut, left_out


def _cut(diffs: dict[str, str]) -> tuple[dict[str, str], bool]:
    """The first `DIFF_CHARACTERS` characters of all diffs, in whole lines, and whether anything was cut."""
    kept, room = {}, DIFF_CHARACTERS
    for name, diff in diffs.items():
        kept[name] = diff if len(diff) <= room else diff[:room].rpartition("\n")[0]
        room -= len(kept[name]) + 1
        if kept[name] != diff:
            return kept, True
    return kept, False


def _secrets(diffs: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(path, kinds) of each diff with a secret, in added, removed or unchanged lines."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.core.scan import scan_file
    from detect_secrets.settings import transient_settings

    detectors = {detector.__name__ for detector in get_mapping_from_secret_type_to_class().values()}
    settings = {"plugins_used": [{"name": name} for name in sorted(detectors.difference(NOISY_DETECTORS))]}
    with tempfile.TemporaryDirectory() as folder, transient_settings(settings):
        for name, diff in diffs.items():
            text = "\n".join(dict.fromkeys(line[1:] for line in diff.splitlines()))  # each line once
            kinds: list[str] = ["credentials in an address"] if holds_credentials(text) else []
            # The suffix decides what counts as a secret: unquoted values count in configuration files only.
            for suffix in {Path(name).suffix, ".yaml"}:
                copy = Path(folder) / f"changes{suffix}"
                copy.write_text(text, encoding="utf-8")
                kinds += _kinds(scan_file(str(copy)))
            if kinds:
                yield name, ", ".join(sorted(set(kinds)))


class _Secret(Protocol):
    """A finding of detect-secrets."""

    type: str


def _kinds(found: Iterable[_Secret]) -> list[str]:
    return [str(secret.type) for secret in found]


def state_files(facts: JsonObject) -> dict[str, str]:
    """Return file name -> text of the files with which a clone at the recorded commit repeats this state.

    `dvc.lock` holds the entries of the lineage, and `params.yaml` is that of the work tree. Secrets are redacted.
    """
    files = {}
    if facts["dvc"]["stages"] is not None:
        files[LOCK] = yaml.safe_dump({"schema": "2.0", "stages": facts["dvc"]["stages"]}, sort_keys=False)
    if Path(PARAMS).is_file():
        files[PARAMS] = redacted(Path(PARAMS).read_text(encoding="utf-8"))
    return files


def tags(facts: JsonObject) -> dict[str, str]:
    """Return the short values of a lineage as tags of MLflow."""
    values = {
        "git_commit": facts["git"]["commit"],
        "git_dirty": str(facts["git"]["dirty"]).lower() if facts["git"]["commit"] else None,
        "dvc_lock_sha256": facts["dvc"]["sha256"],
        "data_sha256": facts["data_sha256"],
        "prefect_flow_run": facts["prefect_flow_run"],
        "git_diff_left_out": ", ".join(sorted(facts["git"]["left_out"]))[:TAG_CHARACTERS] or None,
    }
    return {f"afterimage.{name}": value for name, value in values.items() if value is not None}


def _upstream(lock: Path) -> JsonObject | None:
    if not lock.exists():
        return None
    stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages", {})
    return {name: entry for name, entry in sorted(stages.items()) if name not in NOT_UPSTREAM}


def digest(value: object) -> str:
    """Return the SHA-256 of a value as canonical JSON."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def _git(*arguments: str) -> str | None:
    """Output of a Git command; None if Git or the repository is missing."""
    try:
        result = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, errors="replace", timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    # Only line ends are removed: the last line of a diff may be a space, which stands for an empty line of context.
    return result.stdout.rstrip("\n") if result.returncode == 0 else None
