"""Progress bars of stages and commands: one appearance for all of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")
_OPEN: weakref.WeakSet[tqdm[object]] = weakref.WeakSet()


def progress(
    iterable: Iterable[T] | None = None,
    *,
    desc: str,
    total: int | None = None,
    unit: str = "it",
    unit_scale: bool = False,
    initial: int = 0,
    delay: float = 0,
    leave: bool = True,
    disable: bool = False,
) -> tqdm[T]:
    """Return a progress bar on stderr: around `iterable`, or one that the caller advances with `update()`.

    It redraws at most once a second, and follows the width of the terminal.

    Args:
        iterable: What is iterated over; None for a bar that is advanced by hand.
        desc: Text before the bar, such as "encode".
        total: Number of items; None takes `len(iterable)` where it has one.
        unit: Name of an item.
        unit_scale: Whether counts are shown with a metric prefix (k, M, G).
        initial: Items that were done before.
        delay: Seconds before the bar appears, so that short work shows none.
        leave: Whether the bar stays on the terminal after the last item.
        disable: Whether no bar is shown.
    """
    from tqdm import tqdm  # its import takes 50 ms, which `--help` does not need

    bar = tqdm(
        iterable,
        desc=desc,
        total=total,
        unit=unit,
        unit_scale=unit_scale,
        initial=initial,
        delay=delay,
        leave=leave,
        disable=disable,
        mininterval=1,
        dynamic_ncols=True,
    )
    _OPEN.add(bar)
    return bar


def end_line() -> None:
    """Close every bar, so that what is printed next begins a line of its own; an error leaves its bar open."""
    for bar in list(_OPEN):
        bar.close()
