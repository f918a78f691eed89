"""Escaping of external text (class names, captions, licences, paths) in Markdown.

The pages of MLflow, Prefect and model hubs convert Markdown to HTML, so a class named `<script>` or `](javascript:...)`
must be shown as text.
"""

from __future__ import annotations

import html
import re

_SPECIAL = re.compile(r"([\\`*_\[\]|~])")
"""Characters with a meaning inside a line; escaped text never starts a line here."""


def escaped(text: object) -> str:
    """Return `text` on one line with the special characters of Markdown and HTML escaped; also for table cells."""
    return html.escape(_SPECIAL.sub(r"\\\1", one_line(text)), quote=False)


def code(text: object) -> str:
    """Return `text` as a code span, which may contain backticks."""
    line = one_line(text)
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"


def one_line(text: object) -> str:
    """Return `text` with runs of white space and unprintable characters replaced by one space."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
