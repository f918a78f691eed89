"""Captions as titles of rows and columns."""

LONGEST = 28
"""Characters."""


def shortened(text: str, longest: int = LONGEST) -> str:
    """Cut a text after a word so that it has at most `longest` characters, and mark the cut by "..."."""
    if len(text) <= longest:
        return text
    words = text[: longest - 2].rsplit(" ", 1)[0]
    return f"{words[: longest - 3]}..."
