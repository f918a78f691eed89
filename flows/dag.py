"""`make dag`: list the stages in their order, each with the stages that it depends on."""

from __future__ import annotations

import argparse
import sys
import textwrap

from flows import repro
from tasks.runtime import workspace
from tasks.runtime.errors import StageError

WIDTH = 79


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m flows.dag", description="List the stages of dvc.yaml, each with those it depends on."
    ).parse_args()
    try:
        stages = repro.graph(workspace.root())
    except StageError as error:
        sys.exit(f"dag: error: {error}")
    print("\n".join(rows(stages)))


def rows(graph: dict[str, list[str]]) -> list[str]:
    """Lines of at most `WIDTH` characters, in the order of `graph`: a stage and the stages that it depends on."""
    position = {name: number for number, name in enumerate(graph)}
    widest = max(map(len, graph), default=0)
    lines: list[str] = []
    for name, upstream in graph.items():
        listed = ", ".join(sorted(upstream, key=position.__getitem__))
        first = f"{name:<{widest}}  <- " if listed else name
        lines += textwrap.wrap(listed, WIDTH, initial_indent=first, subsequent_indent=" " * (widest + 5)) or [name]
    return lines


if __name__ == "__main__":
    main()
