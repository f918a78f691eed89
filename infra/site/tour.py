"""The page "A tour in pictures": the notebook `docs/tour.py`, executed while the site is built."""

from __future__ import annotations

from pathlib import Path


def pages(root: Path) -> dict[str, str | bytes]:
    """Return the pages and pictures of the executed notebook by their names in the site."""
    del root
    return {"tour.md": "# A tour in pictures\n"}
