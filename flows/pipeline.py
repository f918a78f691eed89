"""Run the chain once as a Prefect flow, here and now.

    python -m flows.pipeline [--workspace NAME [--preset NAME] [key=value ...]]

The flow itself is in `flows/chain.py`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import urllib.error
import urllib.request

from flows import schedule, server
from tasks.params import composition as preset
from tasks.params.redaction import redacted, without_user
from tasks.runtime import loopback, store, workspace
from tasks.runtime.errors import StageError
from tasks.runtime.stage import INTERRUPTED, PREEMPTED

PROBE_SECONDS = 5.0


def main() -> None:
    """Parse the command line, choose the server and run the flow; exit with 0 or one sentence."""
    arguments = _parser().parse_args()
    loopback.exempt(os.environ)
    try:
        store.require_usable(workspace.tracking_uri())
        print(f"pipeline: {choose_server()}", flush=True)
    except StageError as error:
        sys.exit(f"pipeline: error: {redacted(str(error))}")
    exit_on_sigterm("pipeline")
    from flows.chain import COMMITTED, pipeline  # Prefect reads the environment when it is imported

    try:
        state = pipeline(
            workspace=arguments.workspace,
            preset=arguments.preset or COMMITTED,
            overrides=arguments.overrides,
            wait_seconds=arguments.wait,
            jobs=arguments.jobs,
            return_state=True,
        )
    except KeyboardInterrupt:
        print("pipeline: interrupted; the same command continues", file=sys.stderr)
        sys.exit(INTERRUPTED)
    if not state.is_completed():
        sys.exit(f"pipeline: error: {redacted(state.message or state.name)}")
    print(f"pipeline: {state.message}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flows.pipeline",
        description="Run the chain once as a Prefect flow, in this work tree or a clone.",
    )
    parser.add_argument(
        "--workspace", metavar="NAME", help="work in the clone .prefect/workspaces/NAME instead of here"
    )
    parser.add_argument(
        "--preset", metavar="NAME", choices=preset.names(), help="with --workspace: the preset to run there"
    )
    parser.add_argument(
        "--wait", type=float, default=3600.0, metavar="S", help="seconds to wait for another run (3600)"
    )
    parser.add_argument(
        "--jobs", type=int, default=schedule.JOBS, metavar="N", help="independent stages at the same time"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="with --preset: parameters to change")
    return parser


def exit_on_sigterm(command: str) -> None:
    """Let SIGTERM end this process by an exception, after Prefect has ended the stages.

    The default action ends it at once, so that the temporary Prefect server, which is stopped at exit, would remain.
    """

    def end(*_: object) -> None:
        print(f"{command}: terminated; the same command continues", file=sys.stderr)
        sys.exit(PREEMPTED)

    signal.signal(signal.SIGTERM, end)


def choose_server() -> str:
    """Set the environment for the server to use: the caller's, that of this work tree, or a temporary one.

    Returns a clause that names it. Raises `StageError` if the caller's server does not answer.
    """
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    if "PREFECT_API_URL" in os.environ:
        _require_answer(os.environ["PREFECT_API_URL"])
        return f"on the Prefect server {redacted(os.environ['PREFECT_API_URL'])}"
    root = workspace.root()
    process = server.running(root).get("server")
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        del os.environ[name]
    os.environ.update(server.environment(root, process.port if process else None))
    if process:
        return f"on the Prefect server {server.url(process.port)}"
    return "no Prefect server runs here (make serve), so one is started for this run; about 10 s"


def _require_answer(url: str) -> None:
    """Raise `StageError` if no Prefect server answers at `url`; Prefect itself would print a long stack trace."""
    remedy = "start it, correct PREFECT_API_URL, or unset that to use the server of this work tree"
    try:
        urllib.request.urlopen(f"{without_user(url).rstrip('/')}/health", timeout=PROBE_SECONDS).close()  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code in (404, 500, 502, 503, 504):
            raise StageError(f"{redacted(url)} answers {error.code}, so it is no Prefect server; {remedy}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise StageError(f"no Prefect server answers at {redacted(url)} ({reason}); {remedy}") from None


if __name__ == "__main__":
    main()
