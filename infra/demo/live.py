"""A drawing in a thread of its own, whose intermediate images are read while it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from models.parallel import LEAST_IMAGES
from models.request import draw
from tasks.drawing.painter import Painter

if TYPE_CHECKING:
    import torch

    from models.pipeline import Pipeline
    from tasks.drawing.plan import Plan

MOST_IMAGES = 2 * LEAST_IMAGES - 1
"""Most images of a drawing: on a CPU one thread draws them, so that the batches arrive in their order."""
PREVIEW_SECONDS = 0.15
"""Shortest time between two intermediate images, whose decoding takes time from the drawing."""


@dataclass(frozen=True)
class Progress:
    """The state of a drawing of N images."""

    done: int
    """Steps of all images together that are done."""
    total: int
    images: np.ndarray
    """float32 [N, C, H, W], about [-1, 1]: x of each image, decoded; 0 for those that have not begun."""
    finished: bool = False


class _StoppedError(Exception):
    """The drawing was ended before its last step."""


Message: TypeAlias = "Progress | Exception"


def draw_live(pipeline: Pipeline, planned: Plan, stop: threading.Event) -> Iterator[Progress]:
    """Draw the images of a plan, with the same numbers as `models.request.draw`, and yield its progress.

    The last state is `finished`, unless `stop` was set meanwhile. The thread ends with the iterator.

    Raises:
        ValueError: for a request that the model cannot fulfil.
    """
    messages: SimpleQueue[Message] = SimpleQueue()

    def work() -> None:
        try:
            images = draw(Painter(pipeline), planned.request, _Preview(pipeline, planned, stop, messages))
            messages.put(Progress(planned.steps, planned.steps, images, finished=True))
        except Exception as error:  # raised in the thread that reads the messages
            messages.put(error)

    thread = threading.Thread(target=work, name="drawing", daemon=True)
    thread.start()
    try:
        yield from _states(messages)
    finally:
        stop.set()
        thread.join()


def _states(messages: SimpleQueue[Message]) -> Iterator[Progress]:
    while True:
        message = messages.get()
        if isinstance(message, _StoppedError):
            return
        if isinstance(message, Exception):
            raise message
        yield message
        if message.finished:
            return


@dataclass
class _Preview:
    """The callback of the sampler: sends the images as they are, if the reader has taken the last ones."""

    pipeline: Pipeline
    planned: Plan
    stop: threading.Event
    messages: SimpleQueue[Message]
    done: int = 0
    first: int = 0
    """Index of the first image of the present batch."""
    images: np.ndarray = field(init=False)
    sent: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        info = self.pipeline.info
        self.images = np.zeros((len(self.planned.request.seeds), info.channels, info.size, info.size), np.float32)

    def __call__(self, _i: int, _t: float, x: torch.Tensor, _x0: torch.Tensor) -> None:
        if self.stop.is_set():
            raise _StoppedError
        self.done += len(x)
        batch = slice(self.first, self.first + len(x))
        last = self.done * len(self.images) == self.planned.steps * batch.stop
        if last or (self.messages.empty() and time.monotonic() - self.sent >= PREVIEW_SECONDS):
            self.images[batch] = self.pipeline.decode(x).float().cpu().numpy()
        if self.messages.empty() and time.monotonic() - self.sent >= PREVIEW_SECONDS:
            self.messages.put(Progress(self.done, self.planned.steps, self.images.copy()))
            self.sent = time.monotonic()
        if last:
            self.first = batch.stop
