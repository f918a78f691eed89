"""Draw the packages and their imports into `docs/architecture.md`, from the code itself.

    python -m infra.architecture [--check]

An arrow says that at least one module of a package imports a module of the other one. Imports inside functions
count, imports under TYPE_CHECKING do not. `--check` writes nothing and fails if the document is out of date.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import grimp

DOCUMENT = Path("docs/architecture.md")
BEGIN, END = "<!-- packages: begin -->", "<!-- packages: end -->"
LAYERS = ("infra", "flows", "tasks", "models")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.architecture", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the document is out of date")
    check = parser.parse_args().check
    text = DOCUMENT.read_text(encoding="utf-8")
    fresh = updated(text, diagram())
    if check and fresh != text:
        print(f"architecture: {DOCUMENT} is out of date; run 'python -m infra.architecture'", file=sys.stderr)
        return 1
    if fresh != text:
        DOCUMENT.write_text(fresh, encoding="utf-8")
        print(f"architecture: wrote {DOCUMENT}")
    return 0


def imports() -> dict[str, set[str]]:
    """Package -> packages that it imports, over all modules of the project."""
    graph = grimp.build_graph(*LAYERS, exclude_type_checking_imports=True, cache_dir=None)
    packages = {module for module in graph.modules if graph.find_children(module)}
    found: dict[str, set[str]] = defaultdict(set)
    for module in sorted(graph.modules):
        home = package_of(module, packages)
        for imported in graph.find_modules_directly_imported_by(module):
            other = package_of(imported, packages)
            if other != home:
                found[home].add(other)
    return dict(found)


def package_of(module: str, packages: set[str]) -> str:
    """The package that holds `module`; a package stands for itself."""
    return module if module in packages else module.rpartition(".")[0]


def diagram() -> str:
    """The imports as a Mermaid flowchart: one box a package, one frame a layer."""
    arrows = imports()
    packages = sorted({*arrows, *(other for others in arrows.values() for other in others)})
    lines = ["```mermaid", "flowchart TB"]
    for layer in LAYERS:
        lines.append(f"  subgraph {layer}_layer [{layer}/]")
        inside = [package for package in packages if package.partition(".")[0] == layer]
        lines += [f"    {_node(package)}[{_label(package)}]" for package in inside]
        lines.append("  end")
    for package in packages:
        lines += [f"  {_node(package)} --> {_node(other)}" for other in sorted(arrows.get(package, ()))]
    return "\n".join([*lines, "```"])


def _node(package: str) -> str:
    return package.replace(".", "_")


def _label(package: str) -> str:
    layer, _, name = package.partition(".")
    return name or {"tasks": "stages", "models": "diffusion"}.get(layer, layer)


def updated(text: str, drawn: str) -> str:
    """`text` with the diagram between its two markers replaced. Raises `ValueError` without the markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{DOCUMENT} must contain the lines '{BEGIN}' and '{END}'")
    return f"{before}{BEGIN}\n{drawn}\n{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
