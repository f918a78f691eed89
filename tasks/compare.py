"""Compare runs on one offline page: samples from the same seeds, numbers with spreads, parameters and curves.

    python -m tasks.compare RUN RUN... [--out FILE]

RUN is an MLflow run, a registered version (NAME/3, NAME@champion, models:/NAME/3), a DVC experiment or a Git revision.
Numbers that were measured differently (with different fingerprints) are not compared; the page gives the reason.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tasks.params.redaction import redacted
from tasks.runtime.errors import StageError

PAGE = Path("reports/comparison.html")
FEWEST = 2


def main() -> None:
    """Write the page; an error is one sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="what to compare; at least two")
    parser.add_argument("--out", type=Path, default=PAGE, help=f"the page to write ({PAGE})")
    parser.add_argument("--sweep", metavar="RUN", help="parent run of a sweep, whose leaderboard is shown too")
    arguments = parser.parse_args()
    try:
        refused = compare(arguments.runs, arguments.out, arguments.sweep)
    except StageError as error:
        sys.exit(f"compare: error: {redacted(str(error))}")
    for sentence in refused:
        print(f"compare: warning: {sentence}", file=sys.stderr)
    print(f"compare: wrote {arguments.out}")


def compare(references: list[str], out: Path, sweep: str | None = None) -> list[str]:
    """Write the page to `out`; returns the reasons why numbers are not compared.

    Raises:
        StageError: if a reference names nothing that was evaluated.
    """
    from tasks.comparison import lookup, page
    from tasks.runtime import atomic, tracking
    from tasks.sweeps import records
    from tasks.sweeps.leaderboard import Board

    if len(references) < FEWEST and sweep is None:
        raise StageError(f"one run cannot be compared; name another one beside {references[0]}")
    subjects = [lookup.find(reference) for reference in references]
    client = tracking.connect()
    board = Board.from_json(records.leaderboard(client, sweep)) if sweep else None
    title = f"Comparison of {len(subjects)} runs"
    if sweep:
        title = f"{client.get_run(sweep).info.run_name}: the first seed of every combination"
    built = page.build(subjects, title, board)
    atomic.write_text(out, page.render(built))
    return list(built.refusals)


if __name__ == "__main__":
    main()
