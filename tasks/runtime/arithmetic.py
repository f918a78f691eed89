"""Whether a machine can compute as a parameter or an option asks: in a precision, and with a compiled network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.device import warn_of_emulation
from models.networks import compilation
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from models.networks.compilation import Setting


def check_precision(name: str, precision: str, device: str) -> None:
    """Print a warning if `device` computes in `precision` slowly; `name` is that of the parameter or the option.

    Raises:
        StageError: if it cannot.
    """
    if precision == "fp16" and device == "cpu":
        raise StageError(f"{name} 'fp16' needs a GPU; use 'bf16' or 'no'")
    warn_of_emulation(name, precision, device)


def compiles(name: str, setting: Setting) -> bool:
    """Return whether the parameter `name` asks this machine to compile, see `compilation.wanted`.

    Raises:
        StageError: if it does, and there is no compiler.
    """
    wanted = compilation.wanted(setting)
    if wanted and not compilation.has_compiler():
        raise StageError(f"{name} needs a C++ compiler, and there is no g++; install one or set it to false")
    return wanted
