"""Functions that PyTorch excludes from compilation, without an import of its compiler.

The first call of such a function imports torch._dynamo, which takes as long as importing torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def leave_out_dynamo(functions: Iterable[Callable[..., Any] | None]) -> None:
    """Keep the functions from importing torch._dynamo on their first call; None is left out.

    Each stores what it calls from then on as an attribute; here that is the function itself, so no code of ours may
    compile a call of it. The attribute is not part of PyTorch's interface: a version without it imports torch._dynamo.
    """
    for function in functions:
        if original := getattr(function, "__wrapped__", None):
            original.__dynamo_disable = original
