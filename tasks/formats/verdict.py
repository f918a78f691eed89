"""`data/accepted.json`: the verdict of `validate`, without which no later stage reads the data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from tasks.runtime import atomic
from tasks.runtime.errors import StageError

ACCEPTED = "accepted"
"""Value of the key `verdict`; without it a file is no verdict."""


@dataclass(frozen=True)
class Verdict:
    """What the file says about the accepted data."""

    source: str = "images"
    """Name of the data source."""
    sha256: str = ""
    """Content hash of the images."""
    images: int = 0
    """Number of images in all splits."""
    labels: Mapping[str, int] = field(default_factory=dict)
    """Class name -> number of images; empty without labels."""

    def write(self, accepted: Path) -> None:
        """Write the verdict atomically; equal verdicts give equal bytes."""
        atomic.write_json(accepted, {"verdict": ACCEPTED, **asdict(self)})


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
    if not isinstance(content, dict) or content.get("verdict") != ACCEPTED:
        raise StageError(f"{accepted} does not say that the data was accepted; run 'dvc repro validate'")
    return Verdict(**{entry.name: content[entry.name] for entry in fields(Verdict) if entry.name in content})
