"""The same seeds over the training: the sample grids that `train` wrote, as a strip and as an animation."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tasks.report.animations import Animation, captioned
from tasks.report.page import Figure, Tiles
from tasks.report.process import spread

COLUMNS, PADDING = 10, 2
"""Layout of the grids that `tasks.training.previews` draws."""
STRIP_ROWS, STRIP_COLUMNS = 8, 8
FRAMES = 60
FRAME_MS = 400
TEXT = (
    "A column starts from the same noise and condition at every step. The samples are drawn with the averaged weights "
    "of that step, whose loss on held-out images is in the title of the row."
)


@dataclass(frozen=True)
class Snapshot:
    """The samples at one step of the training, and the losses there."""

    step: int
    grid: Image.Image
    """RGBA, `COLUMNS` images a row."""
    held_out_loss: float | None
    """None where it was not measured."""

    @property
    def title(self) -> str:
        """Such as "step 100, loss 0.53"."""
        loss = "" if self.held_out_loss is None else f", held-out loss {self.held_out_loss:.3g}"
        return f"step {self.step:,}{loss}"


def snapshots(training: Path) -> list[Snapshot]:
    """Read the grids of `reports/train/samples` with the held-out loss of the same step, in the order of the steps."""
    with (training / "history.csv").open(encoding="utf-8", newline="") as file:
        losses = {int(row["step"]): row.get("held_out_loss") for row in csv.DictReader(file)}
    found = []
    for path in sorted((training / "samples").glob("step-*.png")):
        step = int(path.stem.removeprefix("step-"))
        loss = losses.get(step)
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            found.append(Snapshot(step, image.convert("RGBA"), float(loss) if loss else None))
    return found


def cut(grid: Image.Image) -> np.ndarray:
    """Cut a grid into its images, uint8 [N, 3, S, S], without the repetition that enlarged them."""
    pixels = np.asarray(grid.convert("RGB"))
    side = (pixels.shape[1] + PADDING) // COLUMNS - PADDING
    rows = (pixels.shape[0] + PADDING) // (side + PADDING)
    starts = [(row * (side + PADDING), column * (side + PADDING)) for row in range(rows) for column in range(COLUMNS)]
    images = np.stack([pixels[top : top + side, left : left + side] for top, left in starts])
    for scale in (4, 3, 2):
        small = images[:, ::scale, ::scale]
        if side % scale == 0 and np.array_equal(small.repeat(scale, axis=1).repeat(scale, axis=2), images):
            images = small
            break
    return images.transpose(0, 3, 1, 2)


def figures(training: Path) -> dict[str, Figure]:
    """Return the strip `timelapse`, with its animation; a sentence if the training drew fewer than two grids."""
    found = snapshots(training)
    title = "Time-lapse"
    if len(found) < 2:
        why = "It needs sample grids of two steps; lower train.sample_every to draw more of them."
        return {"timelapse": Figure(title, [why])}
    chosen = [found[index] for index in spread(len(found), STRIP_ROWS)]
    strips = np.stack([cut(each.grid)[:STRIP_COLUMNS] for each in chosen])
    text = [TEXT, f"The animation shows {min(len(found), FRAMES)} steps."]
    seeds = [f"seed {number}" for number in range(strips.shape[1])]
    tiles = Tiles(strips, [each.title for each in chosen], seeds)
    label = "Samples of the same seeds at increasing training steps"
    return {"timelapse": Figure(title, text, tiles, label, animation=_animation(found))}


def _animation(found: list[Snapshot]) -> Animation:
    chosen = [found[index] for index in spread(len(found), FRAMES)]
    frames = captioned([each.grid for each in chosen], [each.title for each in chosen])
    return Animation(frames, FRAME_MS, "Animation of the samples of the same seeds over the training.")
