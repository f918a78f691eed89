"""What the page does with the model: open it, draw with it, write the file to download."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from infra.demo.live import MOST_IMAGES, Progress, draw_live
from models.device import best_device
from models.pipeline import INFO
from tasks.drawing import output, place, plan
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from models.pipeline import Pipeline
    from tasks.drawing.options import Options
    from tasks.drawing.place import Place
    from tasks.drawing.plan import Plan

Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Opened:
    """A model in memory."""

    place: Place
    written: int
    """Modification time of its description, ns: another training in the same folder is another model."""
    pipeline: Pipeline


@dataclass(frozen=True)
class Drawing:
    """A drawing while it runs."""

    planned: Plan
    progress: Progress
    file: Path | None = None
    """The PNG file with the settings, once it is finished."""


@dataclass
class Studio:
    """The model that was used last, and the drawings that run."""

    names: frozenset[str]
    """The models of the page; a browser cannot open another folder of this machine."""
    opened: Opened | None = None
    stops: dict[str, threading.Event] = field(default_factory=dict)
    """Session of a browser -> what ends its drawing."""

    def open(self, name: str) -> Opened:
        """Return a model, which is loaded if it is not the one used last.

        Raises:
            StageError: if it is missing, damaged or not supported.
        """
        if name not in self.names:
            raise StageError(f"{name!r} is none of the models of this page; add it with --model when it is started")
        found = place.find(name)
        description = found.folder / INFO
        written = description.stat().st_mtime_ns if description.exists() else 0
        if self.opened is None or (self.opened.place, self.opened.written) != (found, written):
            self.opened = None  # two models may not fit the memory
            self.opened = Opened(found, written, place.open_pipeline(found, best_device()))
        return self.opened

    def draw(self, options: Options, interval: Interval, session: str) -> Iterator[Drawing]:
        """Draw what the options ask for, as `python -m tasks.draw` does, with guidance at the levels of `interval`.

        Raises:
            StageError: for what the model does not support, in one sentence.
        """
        opened = self.open(options.model or "")
        stop = self.stops[session] = threading.Event()
        try:
            settings = plan.settings_of(options, None, opened.place, opened.pipeline.info)
            planned = plan.prepare(settings.model_copy(update={"guidance_interval": interval}), opened.pipeline.info)
            if (count := len(planned.request.seeds)) > MOST_IMAGES:
                raise StageError(
                    f"{count} images are more than {MOST_IMAGES}; draw fewer labels, prompts or seeds at once, or use "
                    "'python -m tasks.draw'"
                )
            for progress in draw_live(opened.pipeline, planned, stop):
                yield Drawing(planned, progress, _file(planned, progress) if progress.finished else None)
        except ValueError as error:
            raise StageError(str(error)) from None
        except torch.OutOfMemoryError:
            raise StageError("the memory of the device ran out; draw fewer images at once") from None
        finally:
            self.stops.pop(session, None)

    def stop(self, session: str) -> None:
        """End the drawing of a session, if one runs."""
        if session in self.stops:
            self.stops[session].set()


def _file(planned: Plan, progress: Progress) -> Path:
    """Write the PNG that `python -m tasks.draw` would write, for gradio to serve."""
    folder = Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"]))
    file = folder / "drawing.png"
    output.write_png(file, progress.images, planned.layout, None, planned.settings)
    return file
