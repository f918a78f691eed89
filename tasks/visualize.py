"""Pictures of the process: what the model draws, how noise comes and goes, how training went."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tasks.params import ImageParams, VisualizeParams
from tasks.report import tables as report_tables
from tasks.report.page import Neighbours, Picture, Report, Tiles, render
from tasks.runtime import atomic, integrity, measures, stage
from tasks.runtime.measures import Measurements

if TYPE_CHECKING:
    import numpy as np
    import torch

    from models.pipeline import Pipeline
    from tasks.pictures.images import Samples

STRIP_COLUMNS = 9
FORWARD_ROWS, REVERSE_SAMPLES, UNCONDITIONAL_ROWS = 3, 2, 3
ANIMATION_FRAMES = 48
ANIMATION_PIXELS = 10 * 32 * 32
"""Pixels of one row of the animation before enlargement: ten images of 32 by 32, fewer of larger ones."""
TILE_PIXELS = 64
SEARCH_BYTES = 1 << 29
"""Size of the training pixels up to which the nearest neighbours are searched for."""
HELD_OUT_NEIGHBOURS = 256
PROGRESS_GRIDS = 6


def visualize(
    pipeline: Path,
    images: Path,
    accepted: Path,
    validation: Path,
    training: Path,
    evaluation: Path,
    figures: Path,
    page: Path,
    params: VisualizeParams,
) -> None:
    """Draw the pictures of a trained model and join them in one offline page.

    Writes PNG files to the folder `figures` and the page to `page`. The pictures: samples by class and
    guidance, forward and reverse process, the schedules, an animation of the sampling, training curves,
    nearest training images. The page adds the verdicts of `validation`, and the tables and grids of the evaluation.
    """
    from models.device import best_device
    from models.pipeline import load_pipeline
    from tasks.formats.verdict import require_accepted
    from tasks.pictures.images import load_pixels

    require_accepted(accepted)
    integrity.read_described(pipeline, "afterimage.json", "train")
    model = load_pipeline(pipeline, best_device())
    image = ImageParams.model_validate({"resolution": model.info.size, "channels": model.info.channels})
    held_out = load_pixels(images, "test", image)
    drawn = _draw(model, params)
    tiles = {
        "samples": drawn.samples,
        "forward": _forward(model, held_out, params.seed),
        "forward_by_schedule": _forward_by_schedule(model, held_out, params.seed),
        "reverse": _reverse(drawn.trajectory, drawn.names),
    }
    neighbours = _neighbours(images, image, held_out, drawn)
    if neighbours:
        tiles["neighbours"] = neighbours.tiles
    charts = _charts(model, training)
    measured = measures.read(evaluation / measures.FILE)
    with atomic.writing_folder(figures) as folder:
        _write_figures(folder, tiles, charts, drawn)
        animation, still = ((folder / name).read_bytes() for name in ("denoising.png", "denoised.png"))
    report = Report(
        title=_title(model),
        facts=_facts(model, params),
        conditional=model.info.conditioning != "none",
        prediction=model.info.prediction,
        min_snr_gamma=_min_snr_gamma(training),
        schedule=model.info.schedule,
        sampler=report_tables.sampler_name(params.sampler, params.steps),
        animation=animation,
        still=still,
        samples=tiles["samples"],
        forward=tiles["forward"],
        forward_by_schedule=tiles["forward_by_schedule"],
        reverse=tiles["reverse"],
        schedules_svg=charts["schedules"].svg,
        training_svg=charts["training"].svg,
        progress=_progress(training / "samples"),
        data=report_tables.data(validation),
        codec=report_tables.codec(training / "codec"),
        reconstructions=report_tables.reconstructions(training / "codec"),
        neighbours=neighbours,
        **report_tables.measures(measured),
        tables=report_tables.tables(evaluation),
        evaluation_grids=report_tables.grids(evaluation, measured),
        provenance=_provenance(model, measured),
    )
    atomic.write_text(page, render(report))
    print(f"visualize: {page} shows {len(list(figures.iterdir()))} figures, also in {figures}")


@dataclass
class Trajectory:
    """Sampler callback that keeps some steps: t, and uint8 [K, C, H, W] of x_t and of the predicted x_0."""

    x: torch.Tensor
    """x_t before the next step; at first the noise from which sampling starts."""
    kept: Sequence[int]
    decode: Callable[[torch.Tensor], torch.Tensor]
    """From what the network sees to images."""
    times: list[int] = field(default_factory=list)
    noisy: list[np.ndarray] = field(default_factory=list)
    predicted: list[np.ndarray] = field(default_factory=list)

    def __call__(self, i: int, t: int, x: Any, x0: Any) -> None:
        from models.pixels import to_uint8

        if i in self.kept:
            self.times.append(t)
            for pictures, seen in ((self.noisy, self.x), (self.predicted, x0)):
                pictures.append(to_uint8(self.decode(seen).float().cpu().numpy()))
        self.x = x


@dataclass(frozen=True)
class Drawn:
    samples: Tiles
    trajectory: Trajectory
    names: list[str]
    """What each column shows; empty strings for an unconditional model."""


def _draw(model: Pipeline, params: VisualizeParams) -> Drawn:
    """Samples by class and guidance, and the steps of one row on the way: that of the middle guidance."""
    import numpy as np
    import torch

    from models.pixels import to_uint8
    from models.samplers import Sampling, SeededNoise

    columns = range(params.columns)
    conditional = model.info.conditioning != "none"
    labels = [column * len(model.info.classes) // params.columns for column in columns] if conditional else None
    names = [model.info.classes[label] for label in labels] if labels else [""] * params.columns
    scales = params.guidance_scales if conditional else (1.0,) * UNCONDITIONAL_ROWS
    followed = len(scales) // 2 if conditional else 0
    rows = []
    with tqdm(
        total=len(scales) * params.steps, desc="visualize", unit="step", mininterval=1, dynamic_ncols=True, delay=2
    ) as bar:
        for row, scale in enumerate(scales):
            # The same seeds in every row of a conditional model: a column differs by its guidance alone.
            seeds = [params.seed + column + (0 if conditional else row * params.columns) for column in columns]
            start = torch.from_numpy(SeededNoise(seeds, model.info.input_shape)()).to(model.device)
            kept = _spread(params.steps, ANIMATION_FRAMES) if row == followed else ()
            path = Trajectory(start, kept, model.decode)
            rows.append(
                model.sample(
                    seeds,
                    labels,
                    Sampling(params.sampler, params.steps, params.eta, scale, params.guidance_interval),
                    batch_size=len(seeds),
                    callback=_both(path, bar.update),
                )
            )
            if row == followed:
                trajectory = path
    titles = [f"w = {scale:g}" for scale in scales] if conditional else [""] * len(scales)
    return Drawn(Tiles(to_uint8(np.stack(rows)), titles, names), trajectory, names)


def _both(callback: Callable[..., None], tick: Callable[[], object]) -> Callable[..., None]:
    def step(*arguments: Any) -> None:
        callback(*arguments)
        tick()

    return step


def _spread(total: int, count: int) -> list[int]:
    """At most `count` indices of 0..total-1, evenly spread, both ends among them."""
    import numpy as np

    return sorted({round(index) for index in np.linspace(0, total - 1, min(total, count))})


def _choose(held_out: Samples, count: int) -> list[int]:
    """Indices of `count` held-out images, of classes spread evenly where there are labels."""
    labels = sorted({int(label) for label in held_out.labels if label >= 0})
    if not labels:
        return _spread(len(held_out.pixels), count)
    wanted = [labels[index] for index in _spread(len(labels), count)]
    return [int((held_out.labels == label).argmax()) for label in wanted]


def _noised(model: Pipeline, pixels: np.ndarray, alpha_bar: np.ndarray, times: Sequence[int], seed: int) -> np.ndarray:
    """x_t of uint8 [C, H, W] at each of `times`, the clean image first: uint8 [1 + len(times), C, H, W]."""
    import numpy as np
    import torch

    from models.pixels import to_uint8
    from models.samplers import SeededNoise

    clean = model.encode(pixels[None])
    noise = torch.from_numpy(SeededNoise([seed], model.info.input_shape)()).to(clean.device)
    steps = [float(np.sqrt(alpha_bar[t])) * clean + float(np.sqrt(1 - alpha_bar[t])) * noise for t in times]
    return np.concatenate([pixels[None], to_uint8(model.decode(torch.cat(steps)).float().cpu().numpy())])


def _forward_times(model: Pipeline) -> list[int]:
    return _spread(model.info.timesteps, STRIP_COLUMNS)[1:]


def _forward(model: Pipeline, held_out: Samples, seed: int) -> Tiles:
    import numpy as np

    times, chosen = _forward_times(model), _choose(held_out, FORWARD_ROWS)
    alpha_bar = model.alpha_bar
    strips = [_noised(model, held_out.pixels[index], alpha_bar, times, seed + row) for row, index in enumerate(chosen)]
    return Tiles(
        np.stack(strips),
        [_class_name(model, int(held_out.labels[index])) for index in chosen],
        ["image", *(f"t = {t}" for t in times)],
        ["ᾱ = 1", *(f"{alpha_bar[t]:.2g}" if alpha_bar[t] >= 0.001 else "< 0.001" for t in times)],
    )


def _forward_by_schedule(model: Pipeline, held_out: Samples, seed: int) -> Tiles:
    import numpy as np

    from models import schedules

    times, index = _forward_times(model), _choose(held_out, FORWARD_ROWS)[-1]
    names = list(schedules.SCHEDULES)
    own = model.info.schedule
    betas = [model.betas if name == own else schedules.betas(name, model.info.timesteps) for name in names]
    levels = [schedules.alpha_bar(beta) for beta in betas]
    strips = [_noised(model, held_out.pixels[index], alpha_bar, times, seed) for alpha_bar in levels]
    columns = ["image", *(f"t = {t}" for t in times)]
    return Tiles(np.stack(strips), names, columns, emphasised_row=names.index(own) if own in names else None)


def _class_name(model: Pipeline, label: int) -> str:
    return model.info.classes[label] if 0 <= label < len(model.info.classes) else ""


def _reverse(trajectory: Trajectory, names: Sequence[str]) -> Tiles:
    """x_t and predicted x_0 of a few samples, at timesteps spread over the sampling."""
    import numpy as np

    steps = _spread(len(trajectory.times), STRIP_COLUMNS)
    strips, titles = [], []
    for sample in _spread(len(names), REVERSE_SAMPLES + 2)[1:-1] or [0]:
        for what, images in (("noisy", trajectory.noisy), ("predicted", trajectory.predicted)):
            strips.append(np.stack([images[step][sample] for step in steps]))
            titles.append(f"{names[sample]}, {what}" if names[sample] else what)
    return Tiles(np.stack(strips), titles, [f"t = {trajectory.times[step]}" for step in steps])


def _neighbours(images: Path, image: ImageParams, held_out: Samples, drawn: Drawn) -> Neighbours | None:
    """The nearest training image of each sample in the first row, and how near held-out images come to theirs.

    None where the training pixels would not fit into `SEARCH_BYTES`.
    """
    import numpy as np

    from tasks.pictures.images import load_pixels, read_index

    count = read_index(images).splits.get("train", 0)
    if not count or count * image.channels * image.resolution**2 > SEARCH_BYTES:
        return None
    train = load_pixels(images, "train", image).pixels
    samples = drawn.samples.images[0]
    nearest, distances = nearest_images(samples, train)
    real = nearest_images(held_out.pixels[_spread(len(held_out.pixels), HELD_OUT_NEIGHBOURS)], train)[1]
    tiles = Tiles(
        np.stack([samples, train[nearest]]), ["sample", "nearest"], drawn.names, [f"{d:.3f}" for d in distances]
    )
    return Neighbours(tiles, f"{np.median(distances):.3f}", f"{np.median(real):.3f}")


def nearest_images(queries: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the candidate nearest to each query, int64 [Q], and its distance, float64 [Q].

    Both uint8 [., C, H, W]. The distance is the root mean squared difference of the pixels, scaled to 0..1.
    """
    import numpy as np

    wanted = queries.reshape(len(queries), -1).astype(np.float32)
    best, index = np.full(len(wanted), np.inf, np.float32), np.zeros(len(wanted), np.int64)
    for start in range(0, len(candidates), 4096):
        block = candidates[start : start + 4096].reshape(-1, wanted.shape[1]).astype(np.float32)
        # |q - c|^2 less |q|^2, which is the same for all candidates
        squares = (block**2).sum(axis=1) - 2 * wanted @ block.T
        found = squares.argmin(axis=1)
        smallest = squares[np.arange(len(wanted)), found]
        index = np.where(smallest < best, start + found, index)
        best = np.minimum(best, smallest)
    differences = queries.astype(np.float64) - candidates[index].astype(np.float64)
    return index, np.sqrt((differences**2).mean(axis=(1, 2, 3))) / 255


def _charts(model: Pipeline, training: Path) -> dict[str, Any]:
    import pandas as pd

    from models import schedules as noise
    from tasks.report import charts

    curves = {}
    for name in noise.SCHEDULES:
        betas = model.betas if name == model.info.schedule else noise.betas(name, model.info.timesteps)
        alpha_bar = noise.alpha_bar(betas)
        curves[name] = {"beta": betas, "alpha_bar": alpha_bar, "log_snr": noise.log_snr(alpha_bar)}
    return {
        "schedules": charts.schedules(curves, model.info.schedule),
        "training": charts.training(pd.read_csv(training / "history.csv")),
    }


def _write_figures(folder: Path, tiles: dict[str, Tiles], charts: dict[str, Any], drawn: Drawn) -> None:
    from models import pictures

    for name, table in tiles.items():
        rows, columns = table.images.shape[:2]
        row_titles = table.row_titles if any(table.row_titles) else None
        column_titles = table.column_titles if any(table.column_titles) else None
        flat = table.images.reshape(rows * columns, *table.images.shape[2:])
        picture = pictures.grid(flat, columns, _scale(flat), row_titles, column_titles)
        pictures.save_png(picture, folder / f"{name}.png")
    for name, chart in charts.items():
        (folder / f"{name}.png").write_bytes(chart.png)
    frames = _frames(drawn.trajectory, drawn.names)
    pictures.save_animation(frames, folder / "denoising.png")
    pictures.save_png(frames[-1], folder / "denoised.png")


def _scale(images: np.ndarray) -> int:
    return max(1, round(TILE_PIXELS / images.shape[-1]))


def _frames(trajectory: Trajectory, names: Sequence[str]) -> list[Any]:
    """One picture per kept step: noisy images above, predicted clean ones below."""
    import numpy as np

    from models import pictures

    largest = 2 * TILE_PIXELS
    count = min(len(names), max(1, ANIMATION_PIXELS // min(trajectory.noisy[0].shape[-1], largest) ** 2))
    titles = names[:count] if any(names) else None
    frames = []
    for t, noisy, predicted in zip(trajectory.times, trajectory.noisy, trajectory.predicted, strict=True):
        both = pictures.shrunk(np.concatenate([noisy[:count], predicted[:count]]), largest)
        frames.append(pictures.grid(both, count, _scale(both), [f"t = {t}", "predicted"], titles))
    return frames


def _title(model: Pipeline) -> str:
    kinds = {"none": "unconditional", "label": f"{len(model.info.classes)} classes", "text": "drawn from text"}
    kind = kinds[model.info.conditioning]
    colour = "grey" if model.info.channels == 1 else "colour"
    return f"A diffusion model of {model.info.size} × {model.info.size} {colour} images, {kind}"


def _facts(model: Pipeline, params: VisualizeParams) -> list[tuple[str, str]]:
    weights = sum(parameter.numel() for parameter in model.unet.parameters())
    return [
        ("Network", f"U-Net, {weights / 1e6:.2f} M weights"),
        ("Images", f"{model.info.size} × {model.info.size}, {'grey' if model.info.channels == 1 else 'RGB'}"),
        *([("Drawn as", f"latents, {' × '.join(map(str, model.info.input_shape))}")] if model.autoencoder else []),
        ("Condition", model.info.conditioning),
        ("Schedule", f"{model.info.schedule}, T = {model.info.timesteps}"),
        ("Prediction", {"epsilon": "noise ε", "sample": "clean image x₀", "v_prediction": "v"}[model.info.prediction]),
        ("Drawn with", report_tables.sampler_name(params.sampler, params.steps)),
    ]


def _min_snr_gamma(training: Path) -> float | None:
    told = json.loads((training / "run.json").read_text(encoding="utf-8"))["params"]
    return float(told["diffusion.min_snr_gamma"]) if told["diffusion.loss_weighting"] == "min_snr" else None


def _progress(samples: Path) -> list[Picture]:
    """Sample grids of training, at most `PROGRESS_GRIDS` spread over the run."""
    paths = sorted(samples.glob("step-*.png"))
    chosen = [paths[index] for index in _spread(len(paths), PROGRESS_GRIDS)] if paths else []
    steps = [int(path.stem.removeprefix("step-")) for path in chosen]
    return [
        Picture(path.read_bytes(), f"step {step:,}", f"Grid of samples after {step} training steps")
        for path, step in zip(chosen, steps, strict=True)
    ]


def _provenance(model: Pipeline, measured: Measurements) -> list[tuple[str, str]]:
    """What identifies the weights and the measurement: no dates, so the page's bytes depend on its inputs alone."""
    return [("Training key", model.info.train_key), ("Fingerprint of the measurement", measured.fingerprint)]


if __name__ == "__main__":
    stage.main(visualize)
