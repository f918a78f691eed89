"""The command line of `flows.pipeline`: one run of the flow, here and now."""

from __future__ import annotations

import argparse
import os
import sys

from flows import server
from tasks.runtime import workspace

INTERRUPTED = 130


def main() -> None:
    """Parse the command line, choose the server, run the flow, leave with 0 or one sentence."""
    arguments = _parser().parse_args()
    print(f"pipeline: {_choose_server()}", flush=True)
    from flows.pipeline import pipeline  # after the environment is set: Prefect reads it when it is imported

    try:
        state = pipeline(
            workspace=arguments.workspace,
            preset=arguments.preset,
            overrides=arguments.overrides,
            wait_seconds=arguments.wait,
            return_state=True,
        )
    except KeyboardInterrupt:
        print("pipeline: interrupted; the same command continues", file=sys.stderr)
        sys.exit(INTERRUPTED)
    if not state.is_completed():
        sys.exit(f"pipeline: error: {state.message or state.name}")
    print(f"pipeline: {state.message}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flows.pipeline",
        description="Run the chain once as a Prefect flow, in this work tree or a clone.",
    )
    parser.add_argument(
        "--workspace", metavar="NAME", help="work in the clone .prefect/workspaces/NAME instead of here"
    )
    parser.add_argument("--preset", metavar="NAME", help="with --workspace: the preset to run there")
    parser.add_argument(
        "--wait", type=float, default=3600.0, metavar="S", help="seconds to wait for another run (3600)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="with --preset: parameters to change")
    return parser


def _choose_server() -> str:
    """Set the environment for the server to use, and say which: the caller's, this work tree's, or a passing one."""
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    if "PREFECT_API_URL" in os.environ:
        return f"on the Prefect server {os.environ['PREFECT_API_URL']}"
    root = workspace.root()
    process = server.running(root).get("server")
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        del os.environ[name]
    os.environ.update(server.environment(root, process.port if process else None))
    if process:
        return f"on the Prefect server {server.url(process.port)}"
    return "no Prefect server runs here (make serve), so one is started for this run; some 10 s"
