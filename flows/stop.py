"""`make stop`: end the processes that `make serve` and `make stack` started in this work tree, and no others.

The worker ends first, so that its run can still report its final state to the servers, and the databases end last.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flows import server
from tasks.runtime import locks, workspace
from tasks.runtime.errors import StageError

ORDER = {server.WORKER: 0, "storage": 2, "postgres": 2}
"""Name of a process -> its turn; the others have the turn 1."""


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m flows.stop", description="End the Prefect server and worker of this work tree."
    ).parse_args()
    root = workspace.root()
    try:
        with locks.exclusive(root / ".prefect" / "serve.lock"):
            stop(root)
    except StageError as error:
        sys.exit(f"stop: error: {error}")


def stop(root: Path) -> None:
    """End the worker and the servers of the work tree `root`, and print what was ended."""
    up = server.running(root)
    if original := server.elsewhere(root):
        print(f"stop: {server.RECORD} was copied from {original}, whose processes continue; end them there: make stop")
    elif not up:
        print("stop: no server or worker of this work tree runs")
    for process in sorted(up.values(), key=lambda process: ORDER.get(process.name, 1)):
        print(f"stop: {process.name} (process {process.pid})", flush=True)
        server.stop(root, process)


if __name__ == "__main__":
    main()
