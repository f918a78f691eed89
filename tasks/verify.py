"""Verify a registered model, from the registry to the bytes it was made of.

    python -m tasks.verify models:/NAME@champion [--json] [--remote]

Walks from the version to its MLflow run, the recorded `dvc.lock`, the Git commit, the files or cached objects, and the
Prefect run; computes all hashes again and prints a tick or a cross for each. Exits with 1 if there is a cross.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.params import ParamsError, load
from tasks.params.redaction import redacted
from tasks.runtime import tracking, workspace
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from tasks.provenance.checks import Check
    from tasks.provenance.outputs import Places


def main() -> None:
    """Parse the command line, verify, and print the tree or JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.verify",
        description="Verify a registered model: MLflow run, dvc.lock, Git commit, files, Prefect run.",
    )
    parser.add_argument("model", nargs="?", help="models:/NAME@ALIAS or models:/NAME/NUMBER; default: the champion")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--remote", action="store_true", help="verify what the DVC remote holds, not the cache")
    given = parser.parse_args()
    try:
        result = verify(given.model or _champion(), given.remote)
    except (StageError, ParamsError) as error:
        sys.exit(f"verify: error: {redacted(str(error))}")
    _print(result, given.json)
    if not result.passed:
        sys.exit(1)


def _champion() -> str:
    return f"models:/{load().register_.model_name}@{tracking.CHAMPION}"


def verify(uri: str, always_remote: bool = False) -> Check:
    """Verify the version that `uri` names, with the work tree in this folder.

    Raises:
        StageError: if there is no such version, or MLflow or DVC cannot be used.
    """
    client = tracking.connect()
    from tasks.provenance import version, walk  # after MLflow's environment was set

    return walk.verify(client, version.find(client, uri), _places(always_remote))


def _places(always_remote: bool) -> Places:
    from tasks.provenance import source
    from tasks.provenance.outputs import Places

    root = workspace.root()
    cache = (root / source.dvc(root, "cache", "dir").strip()).resolve()
    try:
        remote = source.dvc(root, "config", "core.remote").strip()
    except StageError:  # DVC exits with an error if the setting does not exist
        remote = None
    if always_remote and remote is None:
        raise StageError("no DVC remote is configured; add one: dvc remote add --default NAME URL")
    return Places(root, Path(cache), remote, always_remote)


def _print(result: Check, as_json: bool) -> None:
    from tasks.provenance.checks import lines

    if as_json:
        print(json.dumps({"passed": result.passed, **result.to_json()}, indent=2, ensure_ascii=False))
        return
    for line in lines(result, sys.stdout.encoding or "utf-8"):
        print(redacted(line))
    failed = sum(1 for _ in result.failures())
    print(f"verify: {f'{failed} checks failed' if failed else 'every check passed'}")


if __name__ == "__main__":
    main()
