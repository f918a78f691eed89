"""Text from outside (class names, captions, licences, paths) inside Markdown: shown as it is, never interpreted.

Markdown is turned into HTML by MLflow's and Prefect's pages and by model hubs, so a class named `<script>` or
`](javascript:...)` must stay text there.
"""

from __future__ import annotations

import html
import re

_SPECIAL = re.compile(r"([\\`*_\[\]|~])")
"""What has a meaning in the middle of a line; every use here has something in front of it."""


def escaped(text: object) -> str:
    """`text` on one line, with the characters that Markdown or HTML would interpret escaped; also for table cells."""
    return html.escape(_SPECIAL.sub(r"\\\1", one_line(text)), quote=False)


def code(text: object) -> str:
    """`text` as a code span, which a backtick inside it does not end."""
    line = one_line(text)
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"


def one_line(text: object) -> str:
    """`text` with line breaks, control and other unprintable characters as single spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
