"""Whether a machine computes in the precision that a parameter or an option names."""

from __future__ import annotations

from models.device import warn_of_emulation
from tasks.runtime.errors import StageError


def check(name: str, precision: str, device: str) -> None:
    """Print a warning if `device` computes in `precision` slowly; `name` is that of the parameter or the option.

    Raises:
        StageError: if it cannot.
    """
    if precision == "fp16" and device == "cpu":
        raise StageError(f"{name} 'fp16' needs a GPU; use 'bf16' or 'no'")
    warn_of_emulation(name, precision, device)
