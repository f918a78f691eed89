"""Run a sweep of hyper-parameters, here and now.

    python -m flows.sweep NAME [--jobs N] [--retries N] [key=value ...]     python -m flows.sweep [NAME] --list

The flow itself is in `flows/trials.py`, the sweeps are in `sweeps/`. The same command continues an interrupted sweep.
"""

from __future__ import annotations

import argparse
import os
import sys

from flows import pipeline
from tasks.params.redaction import redacted
from tasks.runtime import loopback, store, workspace
from tasks.runtime.errors import StageError
from tasks.runtime.stage import INTERRUPTED
from tasks.sweeps import plan, spec

CORES = os.cpu_count() or 1


def main() -> None:
    """Parse the command line, validate the sweep and run the flow; exit with 0 or one sentence."""
    arguments = _parser().parse_args()
    try:
        if arguments.list:
            return _list(arguments.name, arguments.overrides)
        if arguments.name is None:
            raise spec.SweepError(f"name a sweep: {', '.join(spec.names())}")
        count = plan.validate(spec.load(arguments.name), arguments.overrides)
        loopback.exempt(os.environ)
        store.require_usable(workspace.tracking_uri())
        where = pipeline.choose_server()
    except (spec.SweepError, StageError) as error:
        sys.exit(f"sweep: error: {redacted(str(error))}")
    print(f"sweep: {count} trainings, {arguments.jobs} at a time, {where}", flush=True)
    pipeline.exit_on_sigterm("sweep")
    from flows.trials import sweep  # Prefect reads the environment when it is imported

    try:
        state = sweep(
            name=arguments.name,
            jobs=arguments.jobs,
            retries=arguments.retries,
            overrides=arguments.overrides,
            return_state=True,
        )
    except KeyboardInterrupt:
        print("sweep: interrupted; the same command continues", file=sys.stderr)
        sys.exit(INTERRUPTED)
    if not state.is_completed():
        sys.exit(f"sweep: error: {redacted(state.message or state.name)}")
    print(f"sweep: {state.message}")
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flows.sweep",
        description="Train and compare the trials of a sweep in sweeps/, as a Prefect flow.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="a file of sweeps/, without .yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="parameters of all trials to change")
    parser.add_argument("--list", action="store_true", help="list the sweeps, or the trials of NAME; run nothing")
    parser.add_argument("--jobs", type=_positive, default=min(2, CORES), metavar="N", help="trials at the same time")
    parser.add_argument("--retries", type=int, default=1, metavar="N", help="restarts of a trial that failed (1)")
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number of jobs; give at least 1")
    return value


def _list(name: str | None, overrides: list[str]) -> None:
    """Print every sweep with its title, or every training of one."""
    if name is None:
        for each in spec.names():
            print(f"{each:<14} {spec.load(each).title}")
        return
    description = spec.load(name)
    count = plan.validate(description, overrides)
    print(f"{description.title}: {description.question}")
    if description.search is not None:
        print(f"a search of {description.search.trials} points with seeds {description.seeds}")
        return
    for trial in plan.trials(description, overrides):
        measured = "; ".join(plan.words(each.measured) for each in trial.evaluations if each.measured)
        print(f"{trial.label}{f': measured at {measured}' if measured else ''}")
    print(f"{count} trainings")


if __name__ == "__main__":
    main()
