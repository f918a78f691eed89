"""Stage `evaluate`: pipeline, judge, images -> metrics by a declared protocol, a table of samplers, grids."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import atomic, protocol, stage
from tasks.images import require_accepted
from tasks.params import EvaluateParams
from tasks.protocol import Draw, Scorer

if TYPE_CHECKING:
    from PIL import Image

    from models.pipeline import Pipeline

COMPARED = {"ddim": 50, "dpm_solver_pp_2m": 20}
"""Samplers beside the protocol's own in the table, and their steps."""
COLUMNS = ["sampler", "steps", "guidance_scale", "n", "seed_blocks"]
COLUMNS += ["frechet_distance", "kid", "inception_style_score", "clip_score", "label_accuracy", "note"]
IMAGES_PER_DIMENSION = 2
"""A covariance of fewer images per feature dimension says little: such rows of the table leave distances empty."""
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
    and CLIP score with it, over several seed blocks, beside the floor; then compare samplers and draw grids."""
    from models.judge import best_device, load_judge
    from models.pictures import save_png
    from models.pipeline import load_pipeline

    require_accepted(accepted)
    device = best_device()
    model, scale = load_pipeline(pipeline, device), load_judge(judge, device)
    declared = protocol.declare(model, images, scale, params)
    scorer = Scorer(images, scale, declared)
    unguided, guided = protocol.draw_blocks(model, declared)
    measured = protocol.summary(unguided, guided, scorer, declared)
    others = list(_other_draws(model, declared, params))
    grids = {"grid_unguided": unguided[0], "grid_ddpm": others[-1]} | ({"grid_guided": guided[0]} if guided else {})
    with atomic.writing_folder(report) as folder:
        atomic.write_json(folder / "protocol.json", declared)
        rows = _rows(unguided, guided, others, scorer, params.n_compare)
        atomic.write_text(folder / "samplers.csv", _csv(rows))
        for name, drawn in grids.items():
            save_png(picture(drawn, model.classes), folder / f"{name}.png")
    atomic.write_json(timing, {"seconds_per_image": _seconds_per_image([*unguided, *guided, *others])})
    atomic.write_json(metrics, measured)
    _print(measured)


def _other_draws(model: Pipeline, declared: dict[str, Any], params: EvaluateParams) -> Iterator[Draw]:
    """The samplers of the table that the protocol does not use, one seed block each; the full DDPM comes last."""
    for sampler, steps in COMPARED.items():
        if sampler != params.sampler:
            yield protocol.draw(model, declared, params.n_compare, sampler, min(steps, model.timesteps))
    yield protocol.draw(model, declared, params.n_ddpm, "ddpm", model.timesteps)


def _rows(
    unguided: list[Draw], guided: list[Draw], others: list[Draw], scorer: Scorer, n_compare: int
) -> Iterator[dict[str, Any]]:
    """All seed blocks of the protocol's sampler, then its first images and the other samplers' from the same seeds."""
    yield _row(unguided, scorer)
    if guided:
        yield _row(guided, scorer)
    for drawn in (unguided[0].first(n_compare), *others):
        yield _row([drawn], scorer)


def _row(blocks: list[Draw], scorer: Scorer) -> dict[str, Any]:
    drawn, count = blocks[0], len(blocks[0].pixels)
    needed = IMAGES_PER_DIMENSION * scorer.dimensions
    scores = [scorer.fit_to_labels(block.pixels, block.labels) for block in blocks]
    if count >= needed:
        scores = [
            {**score, **scorer.distances(block.pixels), **scorer.inception_style_score(block.pixels)}
            for score, block in zip(scores, blocks, strict=True)
        ]
    means = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
    return {
        "sampler": drawn.sampler,
        "steps": drawn.steps,
        "guidance_scale": drawn.guidance_scale,
        "n": count,
        "seed_blocks": len(blocks),
        "note": "" if count >= needed else f"too few images for distances ({needed} needed)",
        **means,
    }


def _csv(rows: Iterator[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()})
    return text.getvalue()


def picture(drawn: Draw, classes: list[str]) -> Image.Image:
    """A grid with one titled column per class where labels were asked for, else plain rows."""
    from models.pictures import grid

    scale = max(1, GRID_SIDE // drawn.pixels.shape[-1])
    rows = len(drawn.pixels) // max(1, len(classes))
    if drawn.labels is None or not rows or len(classes) > MAX_GRID_CLASSES:
        return grid(drawn.pixels[: GRID_ROWS * PLAIN_GRID_COLUMNS], PLAIN_GRID_COLUMNS, scale)
    shown = drawn.pixels[: min(rows, GRID_ROWS) * len(classes)]
    return grid(shown, len(classes), scale, column_titles=classes)


def _seconds_per_image(draws: list[Draw]) -> dict[str, float]:
    totals: dict[str, tuple[float, int]] = {}
    for drawn in draws:
        name = f"{drawn.sampler}, {drawn.steps} steps, guidance {drawn.guidance_scale:g}"
        seconds, count = totals.get(name, (0.0, 0))
        totals[name] = (seconds + drawn.seconds, count + len(drawn.pixels))
    return {name: seconds / count for name, (seconds, count) in totals.items()}


def _print(measured: dict[str, Any]) -> None:
    beside = (
        ("frechet_distance", "frechet_distance_floor", "floor"),
        ("kid", "kid_floor", "floor"),
        ("inception_style_score", "inception_style_score_real", "real"),
        ("clip_score", "clip_score_real", "real"),
        ("label_accuracy", "label_accuracy_real", "real"),
    )
    for name, other, what in beside:
        if name in measured:
            print(
                f"evaluate: {name} {measured[name]:.4g} +- {measured[f'{name}_spread']:.2g} "
                f"({what} {measured[other]:.4g})"
            )


if __name__ == "__main__":
    stage.main(evaluate)
