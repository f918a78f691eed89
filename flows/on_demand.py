"""`make run`: start a run of the deployment on-demand, which the worker of `make serve` executes."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

from flows import server
from tasks.params import composition
from tasks.runtime import workspace
from tasks.runtime.errors import StageError

DEPLOYMENT = "afterimage/on-demand"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flows.on_demand",
        description=f"Start a run of the deployment {DEPLOYMENT} on the server that `make serve` started.",
    )
    parser.add_argument(
        "preset", nargs="?", metavar="PRESET", choices=composition.names(), help="default: the committed params.yaml"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="parameters that differ from the preset")
    given = parser.parse_args()
    parameters = {name: value for name, value in vars(given).items() if value}
    try:
        variables = server.environment_of_running(workspace.root())
    except StageError as error:
        sys.exit(f"run: error: {error}")
    command = [sys.executable, "-m", "prefect", "deployment", "run", DEPLOYMENT, "--params", json.dumps(parameters)]
    os.execve(sys.executable, command, variables)  # noqa: S606


def advice(root: Path, port: int) -> str:
    """Lines that explain how to start a run: with make, and with Prefect's own command in any shell."""
    prefect = Path(sys.executable).parent / "prefect"
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in server.client_settings(root, port).items())
    return (
        "serve: a run of a preset:  make run PRESET=digits\n"
        "serve: for Prefect's own commands, in a shell:\n"
        f"  export {exports}\n"
        f"  {shlex.quote(str(prefect))} deployment run {DEPLOYMENT} -p preset=digits"
    )


if __name__ == "__main__":
    main()
