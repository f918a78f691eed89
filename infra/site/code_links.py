"""Links from the documentation to the code: `[level](../models/noise/paths.py#DiffusionPath.level)`.

The anchor is a function, class, method or constant. Its line is looked up while the site is built, so it cannot be out
of date, and a name that does not exist stops the build. GitHub shows the file for the same link.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)")
"""The end of a Markdown link that is not an address: path and anchor."""
CODE = re.compile(r"(^ *```.*?^ *```$|`[^`\n]*`)", re.S | re.M)
"""A fenced block or inline code, in which nothing is a link."""
LINES = "__codelineno-0-"
"""Anchor of a line, as `pymdownx.highlight` names it."""
HREF = re.compile(r'href="code:([^"#]+)(?:#(\d+))?"')
"""A resolved link: path in the repository, and line."""


class DeadLinkError(ValueError):
    """A link to code that does not exist."""


def targets(markdown: str, page: str) -> Iterator[tuple[str, str]]:
    """Yield (path in the repository, anchor) of every link that leaves `docs/`; `page` is relative to `docs/`."""
    for found in LINK.finditer(CODE.sub("", markdown)):
        if path := repository_path(found[1], page):
            yield path, found[2] or ""


def repository_path(link: str, page: str) -> str | None:
    """Return the path in the repository that a relative `link` leads to, or None inside `docs/`."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link)) if link else "docs"
    return None if path == "docs" or path.startswith("docs/") else path


def line_of(path: str, name: str) -> int:
    """Return the 1-based line at which the dotted `name` is defined in a Python file of the repository.

    Raises:
        DeadLinkError: if the file or the name does not exist.
    """
    file = ROOT / path
    if not file.is_file():
        raise DeadLinkError(f"{path} does not exist")
    nodes: list[ast.stmt] = ast.parse(file.read_text(encoding="utf-8")).body
    line = 0
    for part in name.split("."):
        found = next((node for node in nodes if part in _names(node)), None)
        if found is None:
            raise DeadLinkError(f"{path} defines no {name}")
        line, nodes = found.lineno, getattr(found, "body", [])
    return line


def _names(node: ast.stmt) -> list[str]:
    """Return the names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id] if isinstance(node.target, ast.Name) else []
    if isinstance(node, ast.Assign):
        listed = [name for target in node.targets for name in (getattr(target, "elts", None) or [target])]
        return [name.id for name in listed if isinstance(name, ast.Name)]
    return []


def resolved(markdown: str, page: str, pages: dict[str, str]) -> str:
    """Return `markdown` with links to code as `code:PATH#LINE`, and links to `pages` (path -> page) relative.

    Raises:
        DeadLinkError: if a file or a name does not exist.
    """

    def replace(found: re.Match[str]) -> str:
        path, anchor = repository_path(found[1], page), found[2] or ""
        if path is None:
            return found[0]
        if path in pages:
            relative = posixpath.relpath(pages[path], posixpath.dirname(page) or ".")
            return f"]({relative}{'#' + anchor if anchor else ''})"
        if not (ROOT / path).is_file():
            raise DeadLinkError(f"{page} links to {path}, which is not a file of the repository")
        try:
            return f"](code:{path}{f'#{line_of(path, anchor)}' if anchor else ''})"
        except DeadLinkError as error:
            raise DeadLinkError(f"{page}: {error}") from None

    parts = CODE.split(markdown)  # text and code by turns
    return "".join(part if index % 2 else LINK.sub(replace, part) for index, part in enumerate(parts))


def source_page(path: str) -> str:
    """Return the name of the page that shows a file of the repository."""
    return f"source/{path}.md"


def source_markdown(path: str) -> str:
    """Return a page that shows a file of the repository with numbered lines."""
    kind = {"py": "python", "yml": "yaml"}.get(suffix := path.rpartition(".")[2], suffix)
    text = (ROOT / path).read_text(encoding="utf-8")
    fence = "`" * 8
    head = "---\nhide: [toc]\nsearch:\n  exclude: true\n---"
    return f'{head}\n# `{path}`\n\n{fence} {{.{kind} linenums="1"}}\n{text}{fence}\n'
