"""Whether a machine computes in the precision that a parameter or an option names."""

from __future__ import annotations

from models.device import emulates_bf16
from tasks.runtime.errors import StageError


def check(name: str, precision: str, device: str) -> None:
    """Print a warning if `device` computes in `precision` slowly; `name` is that of the parameter or the option.

    Raises:
        StageError: if it cannot.
    """
    if precision == "fp16" and device == "cpu":
        raise StageError(f"{name} 'fp16' needs a GPU; use 'bf16' or 'no'")
    if precision == "bf16" and emulates_bf16(device):
        print(f"{name}: this CPU emulates bfloat16, which is slow; 'no' (float32) is faster", flush=True)
