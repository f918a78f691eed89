"""`data/accepted.json`: the verdict of `validate`, without which no later stage reads the data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tasks.runtime.errors import StageError


@dataclass(frozen=True)
class Verdict:
    """The accepted data."""

    source: str = "images"
    """Name of the data source."""
    sha256: str = ""
    """Content hash of the images."""


def require_accepted(accepted: Path) -> Verdict:
    """Read the verdict.

    Raises:
        StageError: if the data was not accepted.
    """
    try:
        content = json.loads(accepted.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{accepted} does not exist, so the data was not accepted; run 'dvc repro validate'") from None
    except ValueError as error:
        raise StageError(f"{accepted} is damaged ({error}); run 'dvc repro -f -s validate'") from None
    if not isinstance(content, dict) or content.get("verdict") != "accepted":
        raise StageError(f"{accepted} does not say that the data was accepted; run 'dvc repro validate'")
    return Verdict(**{name: content[name] for name in ("source", "sha256") if name in content})
