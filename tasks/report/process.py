"""Pictures of the diffusion process: samples, forward and reverse process, and the nearest training images.

Each function returns `Tiles`, the images of one table of the report, as uint8 [rows, columns, C, H, W].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from models.images import pictures
from models.images.pixels import to_uint8
from models.noise import schedules
from models.noise.paths import RECTIFIED_FLOW
from models.noise.samplers import Callback, SeededNoise
from models.parallel import on_devices
from tasks.pictures.images import load_pixels
from tasks.pictures.index import read_index
from tasks.report.animations import FONT, Animation, captioned
from tasks.report.page import Neighbours, Tiles
from tasks.runtime.measures import guidance_name
from tasks.runtime.progress import progress

if TYPE_CHECKING:
    from models.noise.paths import Level
    from models.noise.paths import Path as NoisePath
    from models.pipeline import Pipeline
    from tasks.params import ImageParams, VisualizeParams
    from tasks.pictures.samples import Samples, Split

STRIP_COLUMNS = 9
FORWARD_ROWS, REVERSE_SAMPLES, UNCONDITIONAL_ROWS = 3, 2, 3
ANIMATION_FRAMES = 48
FRAME_MS = 80
ANIMATION_PIXELS = 10 * 32 * 32
"""Pixels of a row of the animation before enlargement: ten images of 32 x 32, fewer of larger ones."""
NOTE_SIZE, NOTE_GAP = 12, 2
"""Pixels: the text of a column's note, and the gap between two tiles."""
TILE_PIXELS = 64
"""Side of a tile in the PNG files, roughly."""
SEARCH_BYTES = 1 << 29
"""Largest size of all training pixels among which nearest neighbours are searched for."""
SEARCH_BLOCK = 4096
"""Training images that are compared at a time."""
HELD_OUT_NEIGHBOURS = 256


@dataclass
class Trajectory:
    """Sampler callback that keeps some steps: t, x_t and the predicted x_0, as uint8 [K, C, H, W]."""

    x: torch.Tensor
    """x_t before the next step; at first the noise from which sampling starts."""
    kept: Sequence[int]
    """Indices of the steps to keep."""
    decode: Callable[[torch.Tensor], torch.Tensor]
    """See `Pipeline.decode`."""
    times: list[float] = field(default_factory=list)
    states: list[torch.Tensor] = field(default_factory=list)
    """x_t before each kept step, as the network receives it."""
    noisy: list[np.ndarray] = field(default_factory=list)
    predicted: list[np.ndarray] = field(default_factory=list)

    def __call__(self, i: int, t: float, x: torch.Tensor, x0: torch.Tensor) -> None:
        if i in self.kept:
            self.times.append(t)
            self.states.append(self.x)
            for images, values in ((self.noisy, self.x), (self.predicted, x0)):
                images.append(to_uint8(self.decode(values).float().cpu().numpy()))
        self.x = x


@dataclass(frozen=True)
class Drawn:
    """Samples, and the sampling steps of one row of them."""

    samples: Tiles
    trajectory: Trajectory
    names: list[str]
    """Class of each column; empty strings for an unconditional model."""
    labels: list[int] | None
    """The same as numbers; None for an unconditional model."""
    scale: float
    """Guidance scale of the row that the trajectory follows."""


def draw(model: Pipeline, params: VisualizeParams) -> Drawn:
    """Draw a row of samples for each guidance scale, and keep the steps of the middle row.

    The seeds of all rows are the same, so a column differs by its guidance alone. A model without condition and
    guidance gets `UNCONDITIONAL_ROWS` rows of different seeds.
    """
    columns = range(params.columns)
    conditional = model.info.conditioning != "none"
    labels = [column * len(model.info.classes) // params.columns for column in columns] if conditional else None
    names = [model.info.classes[label] for label in labels] if labels else [""] * params.columns
    guided = conditional or set(params.guidance_scales) != {1.0}
    scales = params.guidance_scales if guided else (1.0,) * UNCONDITIONAL_ROWS
    followed = len(scales) // 2 if guided else 0
    with progress(desc="visualize", total=len(scales) * params.steps, unit="step", delay=2) as bar:

        def drawn(row: int, scale: float, device: str) -> tuple[np.ndarray, Trajectory]:
            on = model.on(device)
            seeds = [params.seed + column + (0 if guided else row * params.columns) for column in columns]
            start = torch.from_numpy(SeededNoise(seeds, on.info.input_shape)()).to(device)
            path = Trajectory(start, spread(params.steps, ANIMATION_FRAMES) if row == followed else (), on.decode)
            callback = _both(path, bar.update)
            images = on.sample(seeds, labels, params.sampling(scale), batch_size=len(seeds), callback=callback)
            return images, path

        each = [functools.partial(drawn, row, scale) for row, scale in enumerate(scales)]
        rows, paths = zip(*on_devices(each, model.device), strict=True)
    titles = [f"w = {guidance_name(scale, params.guidance)}" if guided else "" for scale in scales]
    return Drawn(Tiles(to_uint8(np.stack(rows)), titles, names), paths[followed], names, labels, scales[followed])


def _both(callback: Callback, tick: Callable[[], object]) -> Callback:
    def step(i: int, t: float, x: torch.Tensor, x0: torch.Tensor) -> None:
        callback(i, t, x, x0)
        tick()

    return step


def spread(total: int, count: int) -> list[int]:
    """Return at most `count` evenly spread indices of 0..total-1, including both ends."""
    return sorted({round(index) for index in np.linspace(0, total - 1, min(total, count))})


def held_out_rows(split: Split) -> np.ndarray:
    """Return the held-out images that the pictures show or compare with, as rows of the split."""
    return np.asarray([*_choose(split.labels, FORWARD_ROWS), *spread(len(split.keys), HELD_OUT_NEIGHBOURS)], np.int64)


def _choose(labels: np.ndarray, count: int) -> list[int]:
    """Return the rows of `count` held-out images, of evenly spread classes if they have labels."""
    known = sorted({int(label) for label in labels if label >= 0})
    if not known:
        return spread(len(labels), count)
    wanted = [known[index] for index in spread(len(known), count)]
    return [int((labels == label).argmax()) for label in wanted]


def _noised(model: Pipeline, pixels: np.ndarray, path: NoisePath, times: Sequence[int], seed: int) -> np.ndarray:
    """Return the image uint8 [C, H, W] and its x_t at each of `times`: uint8 [1 + len(times), C, H, W].

    x_t = alpha_t x_0 + sigma_t eps, with the same eps for all t.
    """
    clean = model.encode(pixels[None])
    noise = torch.from_numpy(SeededNoise([seed], model.info.input_shape)()).to(clean.device)
    steps = [level.alpha * clean + level.sigma * noise for level in map(path.level, times)]
    return np.concatenate([pixels[None], to_uint8(model.decode(torch.cat(steps)).float().cpu().numpy())])


def _forward_times(model: Pipeline) -> list[int]:
    return spread(model.info.timesteps, STRIP_COLUMNS)[1:]


def forward(model: Pipeline, held_out: Samples, seed: int) -> Tiles:
    """Show the forward process of a few held-out images."""
    times, chosen = _forward_times(model), _choose(held_out.labels, FORWARD_ROWS)
    signal = [model.path.level(t).signal for t in times]
    pixels = held_out.at(np.asarray(chosen))
    strips = [_noised(model, image, model.path, times, seed + row) for row, image in enumerate(pixels)]
    return Tiles(
        np.stack(strips),
        [_class_name(model, int(held_out.labels[index])) for index in chosen],
        ["image", *(f"t = {t}" for t in times)],
        ["signal 1", *(f"{share:.2g}" if share >= 0.001 else "< 0.001" for share in signal)],
    )


def forward_by_schedule(model: Pipeline, held_out: Samples, seed: int) -> Tiles:
    """Show the forward process of one held-out image on each path."""
    times, index = _forward_times(model), _choose(held_out.labels, FORWARD_ROWS)[-1]
    (image,) = held_out.at(np.asarray([index]))
    known, own = known_paths(model), model.info.schedule
    names = list(known)
    strips = [_noised(model, image, path, times, seed) for path in known.values()]
    columns = ["image", *(f"t = {t}" for t in times)]
    return Tiles(np.stack(strips), names, columns, emphasised_row=names.index(own) if own in names else None)


def known_paths(model: Pipeline) -> dict[str, NoisePath]:
    """Return every path by the name of its schedule, with as many timesteps as the model's, and the model's own."""
    timesteps, own = model.info.timesteps, model.info.schedule
    names = (*schedules.SCHEDULES, RECTIFIED_FLOW)
    return {name: model.path if name == own else schedules.path_of(name, timesteps) for name in names}


def _class_name(model: Pipeline, label: int) -> str:
    return model.info.classes[label] if 0 <= label < len(model.info.classes) else ""


def reverse(trajectory: Trajectory, names: Sequence[str]) -> Tiles:
    """Show x_t and the predicted x_0 of a few samples, at timesteps spread over the sampling."""
    steps = spread(len(trajectory.times), STRIP_COLUMNS)
    strips, titles = [], []
    for sample in spread(len(names), REVERSE_SAMPLES + 2)[1:-1] or [0]:
        for what, images in (("noisy", trajectory.noisy), ("predicted", trajectory.predicted)):
            strips.append(np.stack([images[step][sample] for step in steps]))
            titles.append(f"{names[sample]}, {what}" if names[sample] else what)
    return Tiles(np.stack(strips), titles, [f"t = {trajectory.times[step]:.0f}" for step in steps])


def neighbours(images: Path, image: ImageParams, held_out: Samples, drawn: Drawn) -> Neighbours | None:
    """Show the nearest training image of each sample in the first row, with the distances of held-out images.

    Returns None if the training pixels exceed `SEARCH_BYTES`.
    """
    count = read_index(images).splits.get("train", 0)
    if not count or count * image.channels * image.resolution**2 > SEARCH_BYTES:
        return None
    train = load_pixels(images, "train", image).pixels
    samples = drawn.samples.images[0]
    nearest, distances = nearest_images(samples, train)
    compared = held_out.at(np.asarray(spread(len(held_out.keys), HELD_OUT_NEIGHBOURS)))
    real = nearest_images(compared, train)[1]
    tiles = Tiles(
        np.stack([samples, train[nearest]]), ["sample", "nearest"], drawn.names, [f"{d:.3f}" for d in distances]
    )
    return Neighbours(tiles, f"{np.median(distances):.3f}", f"{np.median(real):.3f}")


def nearest_images(queries: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of the candidate nearest to each query, int64 [Q], and its distance, float64 [Q].

    Both uint8 [., C, H, W]. The distance is the root mean squared difference of the pixels, scaled to 0..1.
    """
    wanted = queries.reshape(len(queries), -1).astype(np.float32)
    best, index = np.full(len(wanted), np.inf, np.float32), np.zeros(len(wanted), np.int64)
    for start in range(0, len(candidates), SEARCH_BLOCK):
        block = candidates[start : start + SEARCH_BLOCK].reshape(-1, wanted.shape[1]).astype(np.float32)
        # |q - c|^2 without |q|^2, which is the same for all candidates
        squares = (block**2).sum(axis=1) - 2 * wanted @ block.T
        found = squares.argmin(axis=1)
        smallest = squares[np.arange(len(wanted)), found]
        index = np.where(smallest < best, start + found, index)
        best = np.minimum(best, smallest)
    differences = queries.astype(np.float64) - candidates[index].astype(np.float64)
    return index, np.sqrt((differences**2).mean(axis=(1, 2, 3))) / 255


def animation(model: Pipeline, trajectory: Trajectory, names: Sequence[str]) -> Animation:
    """Return the sampling: in each frame the noisy images above the predicted clean ones, with t and log-SNR."""
    largest = 2 * TILE_PIXELS
    count = min(len(names), max(1, ANIMATION_PIXELS // min(trajectory.noisy[0].shape[-1], largest) ** 2))
    titles = names[:count] if any(names) else None
    frames = []
    for noisy, predicted in zip(trajectory.noisy, trajectory.predicted, strict=True):
        both = pictures.shrunk(np.concatenate([noisy[:count], predicted[:count]]), largest)
        frames.append(pictures.grid(both, count, tile_scale(both), ["noisy", "predicted"], titles))
    captions = [f"t = {t:.0f}, {snr_note(model.path.level(t))}" for t in trajectory.times]
    return Animation(
        captioned(frames, captions),
        FRAME_MS,
        "Animation of the sampling: noisy images above, predicted clean images below.",
    )


def snr_note(level: Level) -> str:
    """Return the log-SNR of a noise level as text, such as "log SNR −0.3"."""
    return f"log SNR {level.log_snr:.2g}".replace("-inf", "−∞").replace("-", "−")


def tile_scale(images: np.ndarray) -> int:
    """Return the whole factor that enlarges images to about `TILE_PIXELS`."""
    return max(1, round(TILE_PIXELS / images.shape[-1]))


def save_tiles(tiles: Tiles, file: Path) -> None:
    """Write a table of images as one PNG file, without titles if all are empty; notes go above the titles."""
    rows, columns = tiles.images.shape[:2]
    flat = tiles.images.reshape(rows * columns, *tiles.images.shape[2:])
    row_titles = tiles.row_titles if any(tiles.row_titles) else None
    column_titles = tiles.column_titles if any(tiles.column_titles) else None
    table = pictures.grid(flat, columns, tile_scale(flat), row_titles, column_titles)
    side = tile_scale(flat) * flat.shape[-1]
    pictures.save_png(_noted(table, tiles.column_notes, side) if any(tiles.column_notes) else table, file)


def _noted(table: Image.Image, notes: Sequence[str], side: int) -> Image.Image:
    """Add a line with the columns' notes above a table of tiles with this side; notes that are too wide shrink."""
    canvas = Image.new("RGBA", (table.width, table.height + NOTE_SIZE + 2 * pictures.TITLE_GAP))
    canvas.paste(table, (0, canvas.height - table.height))
    draw, step = ImageDraw.Draw(canvas), side + NOTE_GAP
    for number, note in enumerate(reversed(notes)):
        font = ImageFont.truetype(str(FONT), NOTE_SIZE)
        font = font.font_variant(size=min(NOTE_SIZE, int(NOTE_SIZE * side / max(font.getlength(note), 1))))
        middle = table.width - number * step - side / 2
        draw.text((middle, NOTE_SIZE + pictures.TITLE_GAP), note, pictures.TITLE_COLOUR, font, anchor="ms")
    return canvas
