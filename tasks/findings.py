"""Write `docs/findings/`: a page for each sweep and the table of goals, from the runs in MLflow.

    python -m tasks.findings [NAME ...] [--out FOLDER]

A page has a table, a figure, two sentences that state whether a difference exceeds the spread between training seeds,
and the command and commit that produced the numbers. Sweeps that have not run are listed as such.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.params.redaction import redacted
from tasks.runtime.errors import StageError
from tasks.sweeps import spec

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

FOLDER = Path("docs/findings")
INDEX = "README.md"


def main() -> None:
    """Run the command line; an error is one sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.findings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="sweeps to write; by default all that have run")
    parser.add_argument("--out", type=Path, default=FOLDER, help=f"folder to write ({FOLDER})")
    arguments = parser.parse_args()
    try:
        for name in arguments.names:
            spec.load(name)
        for line in write(arguments.names, arguments.out):
            print(f"findings: {line}")
    except (StageError, spec.SweepError) as error:
        sys.exit(f"findings: error: {redacted(str(error))}")


def write(names: list[str], out: Path) -> list[str]:
    """Write the pages of `names`, or of all sweeps that have run, and the index; returns what was written.

    Raises:
        StageError: if one of `names` has not run.
    """
    from tasks.comparison import finding
    from tasks.runtime import atomic, tracking

    client = tracking.connect()
    done = []
    for name in names or spec.names():
        found = finding.read(client, name)
        if found is None:
            if names:
                raise StageError(f"sweep '{name}' has no leaderboard in MLflow; run 'python -m flows.sweep {name}'")
            continue
        atomic.write_text(out / f"{name}.md", finding.page(found))
        atomic.write_bytes(out / f"{name}.png", finding.figure(found))
        done.append(f"wrote {out / name}.md")
    atomic.write_text(out / INDEX, _index(client, out))
    return [*done, f"wrote {out / INDEX}"]


def _index(client: MlflowClient, out: Path) -> str:
    """The index: a line for each sweep, and the table of goals."""
    from tasks import goals
    from tasks.comparison import finding

    lines = ["# Findings", "", "Written by `python -m tasks.findings` from the runs in MLflow.", "", "## Sweeps", ""]
    for name in spec.names():
        title = spec.load(name).title
        found = finding.read(client, name) if (out / f"{name}.md").exists() else None
        if found is None:
            lines.append(f"- {title}: not run yet; `python -m flows.sweep {name}` runs it.")
        else:
            lines.append(f"- [{title}]({name}.md): {finding.sentences(found)}")
    rows = [row | ({"note": "not run here"} if row["note"] == goals.NOT_RUN else {}) for row in goals.goals(client)]
    return "\n".join([*lines, "", "## Goals", "", goals.markdown(rows)])


if __name__ == "__main__":
    main()
