"""`make stop`: end what `make serve` started in this work tree, and nothing else.

The worker goes first, so that a run which it carries can still tell the server how it ended.
"""

from __future__ import annotations

import argparse

from flows import server
from tasks.runtime import locks, workspace


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m flows.stop", description="End the Prefect server and worker of this work tree."
    ).parse_args()
    root = workspace.root()
    with locks.exclusive(root / ".prefect" / "serve.lock"):
        up = server.running(root)
        if not up:
            print("stop: nothing of this work tree runs")
        for process in reversed(up.values()):
            print(f"stop: {process.name} (process {process.pid})", flush=True)
            server.stop(root, process)


if __name__ == "__main__":
    main()
