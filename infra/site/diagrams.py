"""Mermaid flowcharts as tables: Mermaid itself is a script from a CDN, and a hundred arrows are read better as rows."""

from __future__ import annotations

import itertools
import re

BLOCK = re.compile(r"^```mermaid\n(.*?)^```$", re.S | re.M)
NODE = re.compile(r"^\s*(\w+)\[([^\]]+)\]$")
GROUP = re.compile(r"^\s*subgraph (\w+) \[([^\]]+)\]$")
ARROW = re.compile(r"\s*-->\s*")


def as_tables(markdown: str) -> str:
    """Return `markdown` with each Mermaid block replaced by a table of its arrows."""
    return BLOCK.sub(lambda found: table(found[1]), markdown)


def table(flowchart: str) -> str:
    """Return the arrows of a flowchart as a Markdown table in the order of its nodes."""
    labels: dict[str, str] = {}
    arrows: dict[str, list[str]] = {}
    group = ""
    for line in flowchart.splitlines():
        if found := GROUP.match(line):
            group = found[2].rstrip("/")
        elif found := NODE.match(line):
            labels[found[1]] = found[2] if found[2] == group else f"{group} / {found[2]}" if group else found[2]
        elif line.strip() == "end":
            group = ""
        elif "-->" in line:
            ends = [[name.strip() for name in part.split("&")] for part in ARROW.split(line.strip())]
            for starts, following in itertools.pairwise(ends):
                for name in starts:
                    arrows.setdefault(name, []).extend(following)
    names = [name for name in [*labels, *arrows] if name in arrows]
    rows = [
        f"| {labels.get(name, name)} | {', '.join(labels.get(other, other) for other in dict.fromkeys(arrows[name]))} |"
        for name in dict.fromkeys(names)
    ]
    return "\n".join(["| from | to |", "|---|---|", *rows])
