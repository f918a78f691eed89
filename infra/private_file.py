"""Files with secrets: only their owner may read them, at no moment anybody else."""

from __future__ import annotations

from pathlib import Path

from tasks.runtime import atomic


def write(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8."""
    with atomic.writing(path) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text(text, encoding="utf-8")
