"""Stage `evaluate`: pipeline, judge, images -> metrics by a declared protocol, tables and grids."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.evaluation import protocol
from tasks.evaluation.protocol import Draw, Scorer
from tasks.formats.verdict import require_accepted
from tasks.params import IMAGES_PER_DIMENSION, EvaluateParams
from tasks.runtime import atomic, integrity, measures, stage
from tasks.runtime.measures import Measurements
from tasks.runtime.stage import StageError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from models.pipeline import Pipeline

COMPARED = {"ddim": 50, "dpm_solver_pp_2m": 20}
"""Samplers beside the protocol's own in the table, without added noise (eta 0), and their steps."""
COLUMNS = ["sampler", "steps", "eta", "guidance_scale", "n", "seed_blocks"]
COLUMNS += ["frechet_distance", "kid", "precision", "recall"]
COLUMNS += ["inception_score", "inception_style_score", "clip_score", "label_accuracy", "note"]
SWEEP_COLUMNS = ["guidance_scale", "n", "frechet_distance", "kid", "precision", "recall", "inception_score"]
SWEEP_COLUMNS += ["clip_score", "label_accuracy", "note"]
CLASS_COLUMNS = ["class", "n", "label_accuracy", "clip_score", "n_unguided", "kid", "kid_floor"]
TIMESTEP_COLUMNS = ["timestep", "alpha_bar", "n", "squared_error", "psnr"]
TIMESTEPS, N_TIMESTEP = 10, 128
NEAREST = 10
GRID_ROWS, GRID_SIDE, MAX_GRID_CLASSES, PLAIN_GRID_COLUMNS = 10, 80, 20, 8


def evaluate(
    pipeline: Path,
    images: Path,
    accepted: Path,
    judge: Path,
    metrics: Path,
    report: Path,
    timing: Path,
    params: EvaluateParams,
) -> None:
    """Sample by a declared protocol and measure: distances to the held-out images without guidance, label accuracy
    and CLIP score with it, over several seed blocks, beside the floor. Then compare samplers and guidance scales,
    classes and timesteps, and draw grids. All of it goes to the folder `report`, and the headline to `metrics`.

    Raises `StageError` before anything is drawn where there are too few images for the features, unless
    `params.allow_small_n`.
    """
    from models.device import best_device
    from models.judges.judge import load_judge
    from models.pictures import save_png
    from models.pipeline import load_pipeline

    require_accepted(accepted)
    device = best_device()
    integrity.read_described(pipeline, "afterimage.json", "train")
    integrity.read_described(judge, "judge.json", "judge")
    model, scale = load_pipeline(pipeline, device), load_judge(judge, device)
    declared = protocol.declare(model, images, scale, params)
    scorer = Scorer(images, scale, declared)
    few = scorer.small_n()
    if few and not params.allow_small_n:
        raise StageError(
            f"there are {few}; raise evaluate.n_distance and hold out more images, or have the numbers say so: set "
            "evaluate.allow_small_n to true"
        )
    unguided, guided = protocol.draw_blocks(model, declared)
    measured = protocol.summary(unguided, guided, scorer, declared)
    others = list(_other_draws(model, declared, params))
    swept = list(_sweep(model, declared, unguided[0], guided, params))
    grids = {"grid_unguided": unguided[0], "grid_ddpm": others[-1]} | ({"grid_guided": guided[0]} if guided else {})
    with atomic.writing_folder(report) as folder:
        atomic.write_json(folder / "protocol.json", declared)
        measured.write(folder / measures.FILE)
        rows = _rows(unguided, guided, others, scorer, params)
        atomic.write_text(folder / "samplers.csv", _csv(COLUMNS, rows))
        atomic.write_text(folder / "timesteps.csv", _csv(TIMESTEP_COLUMNS, _timestep_rows(model, scorer, params)))
        if swept:
            sweep_rows = (_sweep_row(drawn, scorer, params.allow_small_n) for drawn in swept)
            atomic.write_text(folder / "guidance.csv", _csv(SWEEP_COLUMNS, sweep_rows))
        if guided and scorer.has_labels:
            class_rows = _class_rows(unguided, guided, scorer, model.info.classes)
            atomic.write_text(folder / "classes.csv", _csv(CLASS_COLUMNS, class_rows))
        for name, drawn in grids.items():
            save_png(picture(drawn, model.info.classes), folder / f"{name}.png")
        save_png(nearest_picture(unguided[0], scorer), folder / "grid_nearest.png")
    atomic.write_json(timing, {"seconds_per_image": _seconds_per_image([*unguided, *guided, *others, *swept])})
    atomic.write_json(metrics, measured.headline())
    _print(measured)


def _other_draws(model: Pipeline, declared: dict[str, Any], params: EvaluateParams) -> Iterator[Draw]:
    """The samplers of the table that the protocol does not use, one seed block each; the full DDPM comes last."""
    for sampler, steps in COMPARED.items():
        if (sampler, 0.0) != (params.sampler, params.eta):
            yield protocol.draw(model, declared, params.n_compare, sampler, min(steps, model.info.timesteps))
    yield protocol.draw(model, declared, params.n_ddpm, "ddpm", model.info.timesteps)


def _sweep(
    model: Pipeline, declared: dict[str, Any], unguided: Draw, guided: list[Draw], params: EvaluateParams
) -> Iterator[Draw]:
    """The first `n_sweep` images of the first seed block at each scale; what was drawn already is taken from there."""
    for guidance_scale in params.guidance_sweep:
        for drawn in (unguided, *guided[:1]):
            if drawn.guidance_scale == guidance_scale and len(drawn.pixels) >= params.n_sweep:
                yield drawn.first(params.n_sweep)
                break
        else:
            yield protocol.draw(model, declared, params.n_sweep, guidance_scale=guidance_scale)


def _sweep_row(drawn: Draw, scorer: Scorer, allow_small_n: bool) -> dict[str, Any]:
    note = _too_few(len(drawn.pixels), scorer)
    return {
        "guidance_scale": drawn.guidance_scale,
        "n": len(drawn.pixels),
        "note": note,
        **(scorer.distances(drawn.pixels) if not note or allow_small_n else {}),
        **scorer.fit_to_labels(drawn.pixels, drawn.labels),
    }


def _class_rows(
    unguided: list[Draw], guided: list[Draw], scorer: Scorer, classes: list[str]
) -> Iterator[dict[str, Any]]:
    """Each class over all seed blocks: its guided images by accuracy and CLIP score, its unguided ones by distance
    to the held-out images of the class. KID alone stands so few images. With fewer images than classes some have
    none."""
    for label, name in enumerate(classes):
        drawn, plain = (protocol.of_class(draws, label) for draws in (guided, unguided))
        yield {
            "class": name,
            "n": len(drawn),
            "n_unguided": len(plain),
            **(scorer.fit_to_labels(drawn, [label] * len(drawn)) if len(drawn) else {}),
            **scorer.class_distance(plain, label),
        }


def _timestep_rows(model: Pipeline, scorer: Scorer, params: EvaluateParams) -> Iterator[dict[str, Any]]:
    """How far the predicted clean image is from a held-out one, at timesteps spread over the schedule."""
    import math

    import numpy as np

    from models.denoising import error_by_timestep

    seen = int((model.alpha_bar > 0).sum())  # of pure noise, where the last timestep is that, there is no image to tell
    timesteps = sorted({round(t) for t in np.linspace(0, seen - 1, min(TIMESTEPS, seen))})
    pixels, wishes = scorer.held_out_for(model.info.conditioning, N_TIMESTEP)
    options = {"seed": params.seed, "batch_size": params.batch_size}
    errors = error_by_timestep(model, pixels, wishes, timesteps, **options) if len(pixels) else []
    for t, error in zip(timesteps, errors, strict=False):
        yield {
            "timestep": t,
            "alpha_bar": float(model.alpha_bar[t]),
            "n": len(pixels),
            "squared_error": error,
            "psnr": 10 * math.log10(4 / error) if error > 0 else math.inf,  # the values span 2
        }


def _rows(
    unguided: list[Draw], guided: list[Draw], others: list[Draw], scorer: Scorer, params: EvaluateParams
) -> Iterator[dict[str, Any]]:
    """All seed blocks of the protocol's sampler, then its first images and the other samplers' from the same seeds."""
    for blocks in (unguided, guided, *([drawn] for drawn in (unguided[0].first(params.n_compare), *others))):
        if blocks:
            yield _row(blocks, scorer, params.allow_small_n)


def _row(blocks: list[Draw], scorer: Scorer, allow_small_n: bool) -> dict[str, Any]:
    drawn, count = blocks[0], len(blocks[0].pixels)
    note = _too_few(count, scorer)
    scores = [scorer.fit_to_labels(block.pixels, block.labels) for block in blocks]
    if not note or (allow_small_n and count > 1):
        scores = [
            {**score, **scorer.distances(block.pixels), **scorer.inception_style_score(block.pixels)}
            for score, block in zip(scores, blocks, strict=True)
        ]
    means = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
    return {
        "sampler": drawn.sampler,
        "steps": drawn.steps,
        "eta": drawn.eta or "",
        "guidance_scale": drawn.guidance_scale,
        "n": count,
        "seed_blocks": len(blocks),
        "note": note,
        **means,
    }


def _too_few(count: int, scorer: Scorer) -> str:
    needed = IMAGES_PER_DIMENSION * scorer.dimensions
    return "" if count >= needed else f"too few images for distances ({needed} needed)"


def _csv(columns: list[str], rows: Iterable[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()})
    return text.getvalue()


def picture(drawn: Draw, classes: list[str]) -> Image.Image:
    """A grid with one titled column per class where labels were asked for, else plain rows."""
    from models.pictures import grid

    rows = len(drawn.pixels) // max(1, len(classes))
    if drawn.labels is None or not rows or len(classes) > MAX_GRID_CLASSES:
        return grid(*_shown(drawn.pixels[: GRID_ROWS * PLAIN_GRID_COLUMNS], PLAIN_GRID_COLUMNS))
    shown = drawn.pixels[: min(rows, GRID_ROWS) * len(classes)]
    return grid(*_shown(shown, len(classes)), column_titles=classes)


def _shown(pixels: np.ndarray, columns: int) -> tuple[np.ndarray, int, int]:
    """Images as a grid shows them, its columns, and how many times they are enlarged."""
    from models.pictures import shrunk

    small = shrunk(pixels, 2 * GRID_SIDE)
    return small, columns, max(1, GRID_SIDE // small.shape[-1])


def nearest_picture(drawn: Draw, scorer: Scorer) -> Image.Image:
    """The images of a draw that come nearest to a training image, by features, above that image."""
    import numpy as np

    from models.pictures import grid

    rows, distances = scorer.nearest_training(drawn.pixels)
    chosen = np.argsort(distances, kind="stable")[:NEAREST]
    both = np.concatenate([drawn.pixels[chosen], scorer.train.pixels[rows[chosen]]])
    titles = [f"{distance:.2g}" for distance in distances[chosen]]
    return grid(*_shown(both, len(chosen)), ["drawn", "training"], titles)


def _seconds_per_image(draws: list[Draw]) -> dict[str, float]:
    totals: dict[str, tuple[float, int]] = {}
    for drawn in draws:
        seconds, count = totals.get(drawn.name, (0.0, 0))
        totals[drawn.name] = (seconds + drawn.seconds, count + len(drawn.pixels))
    return {name: seconds / count for name, (seconds, count) in totals.items()}


def _print(measured: Measurements) -> None:
    few = f"; few images: {measured.small_n}" if measured.small_n else ""
    for name, measure in measured.measures.items():
        note = f"; {measured.clip_score_note}" if name == measures.CLIP_SCORE and measured.clip_score_note else ""
        mean = f"{measure.value:.4g} +- {measure.spread:.2g}"
        print(f"evaluate: {name} ({measure.condition}) {mean} ({measure.reference or 'no reference'}){few}{note}")


if __name__ == "__main__":
    stage.main(evaluate)
