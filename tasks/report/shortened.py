"""Captions as titles of rows and columns."""

LONGEST = 28
"""Characters."""


def shortened(text: str, longest: int = LONGEST) -> str:
    """Cut a text after a word so that it has at most `longest` characters, and mark the cut by "..."."""
    if len(text) <= longest:
        return text
    kept = text[: longest - 3]
    return f"{kept.rsplit(' ', 1)[0] if ' ' in kept else kept}..."
