"""The verdict of `validate` on the data, which every stage after it asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks.runtime.stage import StageError


def require_accepted(accepted: Path) -> dict[str, Any]:
    """The verdict of `validate` on the data. Raises `StageError` unless it says "accepted"."""
    try:
        verdict: dict[str, Any] = json.loads(accepted.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{accepted} does not exist, so the data was not accepted; run 'dvc repro validate'") from None
    if verdict.get("verdict") != "accepted":
        raise StageError(f"{accepted} does not say that the data was accepted; run 'dvc repro validate'")
    return verdict
