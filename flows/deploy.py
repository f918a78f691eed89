"""`make deploy POOL=NAME`: deploy the flows of `prefect.yaml` for workers on other machines, of any type of work pool.

Each run clones the repository, takes the results so far from the DVC remote, and works as on this machine otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from flows import clone, repro, server
from tasks.params.redaction import redacted, without_user
from tasks.runtime import atomic, loopback, workspace
from tasks.runtime.errors import StageError

TEMPLATES = {
    "process": None,
    "docker": Path("infra") / "containers" / "docker-pool.json",
    "kubernetes": Path("infra") / "kubernetes" / "pool.json",
}
"""Type of a work pool -> the template of its jobs; Prefect has its own for processes."""
LOCAL = ("watch",)
"""Deployments that examine the processes of the machine of `make serve`."""
ON_DEMAND = "on-demand"


def main() -> None:
    given = _parser().parse_args()
    loopback.exempt(os.environ)
    root = workspace.root()
    try:
        _choose_server(root)
        repository = given.repository or _origin(root)
        if without_user(repository) != repository:
            raise StageError("the address of the repository must not contain a password; use Git credentials instead")
        if repro.remote(root) is None:
            raise StageError("no default DVC remote, from which another machine could pull: dvc remote add --default")
        _require_pool(root, given.pool, given.type, given.limit)
        file = root / ".prefect" / f"deploy-{given.pool}.yaml"
        description = compose(root, given.pool, repository, given.branch or _branch(root))
        atomic.write_text(file, yaml.safe_dump(description, sort_keys=False))
        _deploy(root, file)
    except StageError as error:
        sys.exit(f"deploy: error: {redacted(str(error))}")
    names = ", ".join(deployment["name"] for deployment in description["deployments"])
    print(f"deploy: {names}: for workers of {given.pool}, from {repository}")
    print(f"deploy: start one there: prefect worker start --pool {given.pool}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flows.deploy",
        description="Deploy the flows of prefect.yaml on a work pool whose workers are on other machines.",
    )
    parser.add_argument("pool", metavar="POOL", help="name of the work pool")
    parser.add_argument("--type", choices=TEMPLATES, help="creates the pool if it does not exist")
    parser.add_argument("--limit", type=int, metavar="N", help="runs at the same time in a new pool, such as its GPUs")
    parser.add_argument("--repository", metavar="URL", help="that workers clone (default: the remote origin)")
    parser.add_argument("--branch", metavar="NAME", help="that workers check out (default: the branch of this tree)")
    return parser


def compose(root: Path, pool: str, repository: str, branch: str) -> dict[str, Any]:
    """The deployments of `prefect.yaml` with a pull step, on the work pool `pool`, with its name behind theirs.

    The step fetches the code; each stage then takes its results so far from the DVC remote (`flows/place.py`).
    """
    description: dict[str, Any] = yaml.safe_load((root / "prefect.yaml").read_text(encoding="utf-8"))
    kept = [deployment for deployment in description["deployments"] if deployment["name"] not in LOCAL]
    suffix = pool.removeprefix(f"{server.POOL}-")
    for deployment in kept:
        deployment["name"] += f"-{suffix}"
        deployment["work_pool"] = {"name": pool}
        if "data_refresh" in deployment["entrypoint"]:
            deployment["parameters"] = {"pipeline": f"afterimage/{ON_DEMAND}-{suffix}"}
    return {
        "name": description["name"],
        "pull": [{"prefect.deployments.steps.git_clone": {"repository": repository, "branch": branch}}],
        "deployments": kept,
    }


def _choose_server(root: Path) -> None:
    """Set the environment for the server at PREFECT_API_URL if it is set, else for that of this work tree."""
    if "PREFECT_API_URL" in os.environ:
        return
    os.environ.update(server.environment_of_running(root))


def _origin(root: Path) -> str:
    return clone.git(root, "remote", "get-url", "origin", hint="no Git remote 'origin'; name a --repository")


def _branch(root: Path) -> str:
    return clone.git(root, "symbolic-ref", "--short", "HEAD", hint="no branch is checked out here; name a --branch")


def _require_pool(root: Path, name: str, kind: str | None, limit: int | None) -> None:
    """Create the work pool if it does not exist and its type is known. Raises `StageError` if it is not."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(name)
        except ObjectNotFound:
            if kind is None:
                raise StageError(f"there is no work pool {name}; name its --type, which creates it") from None
            file = TEMPLATES[kind]
            template = json.loads((root / file).read_text(encoding="utf-8")) if file else {}
            client.create_work_pool(
                WorkPoolCreate(name=name, type=kind, base_job_template=template, concurrency_limit=limit)
            )


def _deploy(root: Path, file: Path) -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageError(f"prefect deploy refused: {' '.join((done.stderr or done.stdout).split())}")


if __name__ == "__main__":
    main()
