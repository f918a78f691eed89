"""Stage `evaluate`: measure a pipeline by a declared protocol; write metrics, tables and grids."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tasks.formats.prior import Prior
from tasks.formats.verdict import require_accepted
from tasks.params import IMAGES_PER_DIMENSION, EvaluateParams
from tasks.runtime import atomic, integrity, measures, stage
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from models.noise.samplers import Sampling
    from models.pipeline import Pipeline
    from tasks.evaluation.control import Controlled
    from tasks.evaluation.draws import Draw
    from tasks.evaluation.protocol import Protocol
    from tasks.evaluation.scorer import Scorer
    from tasks.runtime.measures import Measurements

Row: TypeAlias = Mapping[str, "float | int | str"]
"""A row of a CSV file by column; columns that it lacks stay empty."""

COMPARED = {"ddim": (10, 50), "dpm_solver_pp_2m": (5, 10, 20)}
COMPARED_FLOW = {"euler": (5, 20), "heun": (5, 10), "dpm_solver_pp_2m": (5, 10, 20)}
"""Samplers and steps that are compared with the protocol's on each kind of path, with eta 0."""
SLOWEST_FLOW = "heun", 50
"""Sampler and steps of the last grid on a rectified flow; on a diffusion path it is DDPM over all timesteps."""
FEW_STEPS, TEACHER_STEPS = (1, 2, 4), (10, 20)
"""Steps of a consistency model and of its teacher that are compared instead."""
COLUMNS = ["sampler", "weights", "steps", "eta", "guidance_scale", "guidance", "n", "seed_blocks"]
COLUMNS += ["frechet_distance", "kid", "cmmd", "precision", "recall"]
COLUMNS += ["inception_score", "inception_style_score", "clip_score", "label_accuracy", "note"]
SWEEP_COLUMNS = ["guidance", "guidance_scale", "n", "frechet_distance", "kid", "cmmd", "precision", "recall"]
SWEEP_COLUMNS += ["inception_score", "clip_score", "label_accuracy", "note"]
CLASS_COLUMNS = ["class", "n", "label_accuracy", "clip_score", "n_unguided", "kid", "kid_floor"]
TIMESTEP_COLUMNS = ["timestep", "signal", "n", "squared_error", "psnr"]
TIMESTEPS, N_TIMESTEP = 10, 128
"""Rows of the table by timestep, and held-out images in each."""
NEAREST = 10
GRID_ROWS, GRID_SIDE, MAX_GRID_CLASSES, PLAIN_GRID_COLUMNS = 10, 80, 20, 8


def evaluate(
    pipeline: Path,
    images: Path,
    accepted: Path,
    judge: Path,
    averages: Path,
    prior: Path,
    metrics: Path,
    report: Path,
    timing: Path,
    params: EvaluateParams,
) -> None:
    """Draw samples by a declared protocol and measure them.

    Distances to the held-out images are measured on unguided samples, label accuracy and CLIP score on guided ones,
    over several seed blocks, beside the floor. Then samplers, guidance scales, classes and timesteps are compared, and
    grids drawn. A model of DreamBooth, with a subject in `prior`, is also measured by that, with the weights at earlier
    steps in `averages`. Everything goes to the folder `report`, the headline numbers to `metrics`.

    Raises `StageError` before anything is drawn if there are too few images for the features, unless
    `params.allow_small_n`.
    """
    from models.device import best_device, keep_freed
    from models.images.pictures import save_png
    from models.judges.judge import load_judge
    from models.networks import compilation
    from models.networks.precision import in_precision
    from models.pipeline import load_pipeline
    from tasks.evaluation import draws, protocol
    from tasks.evaluation.control import measure_control
    from tasks.evaluation.scorer import Scorer
    from tasks.evaluation.summary import measure_parity, summarise
    from tasks.runtime import arithmetic
    from tasks.subjects import measures as subjects

    require_accepted(accepted)
    keep_freed(device := best_device())
    arithmetic.check_precision("evaluate.precision", params.precision, device)
    compiles = arithmetic.compiles("evaluate.compile", params.compile)
    with integrity.loading(pipeline, "afterimage.json", "train"):
        in_float32 = load_pipeline(pipeline, device)
    with integrity.loading(judge, "judge.json", "judge"):
        scoring = load_judge(judge, device)
    described = Prior.load(prior)
    uncompiled = in_precision(in_float32, params.precision)
    model = compilation.compiled_pipeline(uncompiled) if compiles else uncompiled
    declared = protocol.declare(model, images, scoring, params)
    scorer = Scorer(images, scoring, declared)
    few = scorer.small_n()
    if few and not params.allow_small_n:
        raise StageError(
            f"there are {few}; raise evaluate.n_distance and hold out more images, or set evaluate.allow_small_n to "
            "true to measure them nevertheless"
        )
    draws.compile_first(model, declared)
    unguided, guided = draws.draw_blocks(model, declared)
    controlled = measure_control(model, scorer, declared)
    parity = measure_parity(in_float32, uncompiled, model, declared)
    measured = summarise(unguided, guided, scorer, declared, controlled.measured if controlled else None, parity)
    others = list(_other_draws(model, declared, params))
    swept = list(_sweep(model, declared, [unguided[0], *guided[:1]], params))
    learned = (
        subjects.measure(in_float32, averages, prior, described, scoring, params.batch_size) if described else None
    )
    grids = {"grid_unguided": unguided[0], "grid_slowest": others[-1]} | ({"grid_guided": guided[0]} if guided else {})
    with atomic.writing_folder(report) as folder:
        declared.write(folder / protocol.FILE)
        measured.write(folder / measures.FILE)
        network = _columns_of_network(model)
        rows = ({**row, **network} for row in _rows(unguided, guided, others, scorer, params))
        atomic.write_text(folder / "samplers.csv", _csv([*COLUMNS[:-1], *network, COLUMNS[-1]], rows))
        atomic.write_text(folder / "timesteps.csv", _csv(TIMESTEP_COLUMNS, _timestep_rows(in_float32, scorer, params)))
        if swept:
            sweep_rows = (_sweep_row(drawn, scorer, params.allow_small_n) for drawn in swept)
            atomic.write_text(folder / "guidance.csv", _csv(SWEEP_COLUMNS, sweep_rows))
        if guided and declared.measurement.labels is not None and scorer.has_labels:
            class_rows = _class_rows(unguided, guided, scorer, model.info.classes)
            atomic.write_text(folder / "classes.csv", _csv(CLASS_COLUMNS, class_rows))
        for name, drawn in grids.items():
            save_png(grid_of(drawn, model.info.classes), folder / f"{name}.png")
        save_png(grid_of_nearest(unguided[0], scorer), folder / "grid_nearest.png")
        if controlled:
            save_png(_grid_of_control(controlled), folder / "grid_control.png")
        if learned:
            atomic.write_text(folder / "subject.csv", _csv(subjects.COLUMNS, (row.cells() for row in learned.rows)))
            save_png(learned.picture, folder / "grid_subject.png")
    atomic.write_json(timing, {"seconds_per_image": _seconds_per_image([*unguided, *guided, *others, *swept])})
    atomic.write_json(metrics, measured.headline_numbers() | (learned.headlines() if learned else {}))
    _print(measured)


def _other_draws(model: Pipeline, protocol: Protocol, params: EvaluateParams) -> Iterator[Draw]:
    """Draw one seed block with each other sampler of the table; the slowest comes last.

    A consistency model is compared with its teacher, because the other samplers do not fit it.
    """
    from models.noise.paths import RectifiedFlow
    from tasks.evaluation.draws import TEACHER, draw

    timesteps, flow = model.info.timesteps, isinstance(model.path, RectifiedFlow)
    if TEACHER in model.companions:
        student = [("", "consistency", steps) for steps in FEW_STEPS]
        teacher = [(TEACHER, "euler" if flow else "ddim", min(steps, timesteps)) for steps in TEACHER_STEPS]
        for weights, sampler, steps in (*student, *teacher):
            sampling = replace(protocol.unguided, sampler=sampler, steps=steps, eta=0.0)
            if weights or sampling != protocol.unguided:
                yield draw(model, protocol, params.n_compare, sampling, weights=weights)
        return
    known = {protocol.unguided}
    for sampler, counts in (COMPARED_FLOW if flow else COMPARED).items():
        for steps in counts:
            sampling = replace(protocol.unguided, sampler=sampler, steps=min(steps, timesteps), eta=0.0)
            if sampling not in known:
                known.add(sampling)
                yield draw(model, protocol, params.n_compare, sampling)
    sampler, steps = SLOWEST_FLOW if flow else ("ddpm", timesteps)
    yield draw(model, protocol, params.n_slowest, replace(protocol.unguided, sampler=sampler, steps=steps, eta=0.0))


def _sweep(model: Pipeline, protocol: Protocol, drawn: list[Draw], params: EvaluateParams) -> Iterator[Draw]:
    """Draw the first `n_sweep` images of the first seed block with each guidance, or take them from `drawn`."""
    from tasks.evaluation.draws import draw

    for sampling in _swept(model, protocol, params):
        known = (each for each in drawn if each.sampling == sampling and len(each.pixels) >= params.n_sweep)
        if found := next(known, None):
            yield found.first(params.n_sweep)
        else:
            yield draw(model, protocol, params.n_sweep, sampling)


def _swept(model: Pipeline, protocol: Protocol, params: EvaluateParams) -> Iterator[Sampling]:
    """Yield every scale of the sweep with each kind of guidance that the model has; scale 1, which is none, once."""
    kinds = ["classifier_free"] if model.info.conditioning != "none" else []
    kinds += ["auto"] if "guide" in model.companions else []
    for number, kind in enumerate(kinds):
        for scale in params.guidance_sweep:
            if scale != 1:
                yield replace(protocol.unguided, guidance_scale=scale, guidance=kind)
            elif number == 0:
                yield protocol.unguided


def _guidance_kind(sampling: Sampling) -> str:
    """Return the kind of guidance for a table; empty at scale 1, which is no guidance."""
    return sampling.guidance if sampling.guidance_scale != 1 else ""


def _sweep_row(drawn: Draw, scorer: Scorer, allow_small_n: bool) -> Row:
    note = _too_few(len(drawn.pixels), scorer)
    return {
        "guidance": _guidance_kind(drawn.sampling),
        "guidance_scale": drawn.sampling.guidance_scale,
        "n": len(drawn.pixels),
        "note": note,
        **(scorer.distances(drawn.images) if not note or allow_small_n else {}),
        **scorer.fit_to_labels(drawn.images, drawn.labels),
    }


def _class_rows(unguided: list[Draw], guided: list[Draw], scorer: Scorer, classes: list[str]) -> Iterator[Row]:
    """Yield the scores of each class over all seed blocks; a class without images has none."""
    from tasks.evaluation.draws import of_class

    for label, name in enumerate(classes):
        drawn, plain = (of_class(draws, label) for draws in (guided, unguided))
        yield {
            "class": name,
            "n": len(drawn),
            "n_unguided": len(plain),
            **(scorer.fit_to_labels(drawn, [label] * len(drawn)) if len(drawn) else {}),
            **scorer.class_distance(plain, label),
        }


def _timestep_rows(model: Pipeline, scorer: Scorer, params: EvaluateParams) -> Iterator[Row]:
    """Yield the error of the predicted clean image at timesteps spread over the schedule."""
    import math

    from models.denoising import error_by_timestep

    timesteps = model.path.spread(TIMESTEPS)
    pixels, conditions = scorer.held_out_for(model.info.conditioning, N_TIMESTEP)
    errors: list[float] = []
    if len(pixels):
        errors = error_by_timestep(model, pixels, conditions, timesteps, params.seed, params.batch_size)
    for t, error in zip(timesteps, errors, strict=False):
        yield {
            "timestep": t,
            "signal": model.path.level(t).signal,
            "n": len(pixels),
            "squared_error": error,
            "psnr": 10 * math.log10(4 / error) if error > 0 else math.inf,  # values in [-1, 1]: a range of 2
        }


def _rows(
    unguided: list[Draw], guided: list[Draw], others: list[Draw], scorer: Scorer, params: EvaluateParams
) -> Iterator[Row]:
    """Yield the protocol's sampler over all seed blocks, then its first images beside the other samplers'."""
    for blocks in (unguided, guided, *([drawn] for drawn in (unguided[0].first(params.n_compare), *others))):
        if blocks:
            yield _row(blocks, scorer, params.allow_small_n)


def _columns_of_network(model: Pipeline) -> dict[str, str]:
    """Return how the network computes, as columns of the table of samplers: none for float32 and uncompiled."""
    columns = {} if model.precision == "no" else {"network_precision": model.precision}
    return columns if model.compiler is None else columns | {"network_compiled": "yes"}


def _row(blocks: list[Draw], scorer: Scorer, allow_small_n: bool) -> Row:
    sampling, count = blocks[0].sampling, len(blocks[0].pixels)
    note = _too_few(count, scorer)
    scores = [scorer.fit_to_labels(block.images, block.labels) for block in blocks]
    if not note or (allow_small_n and count > 1):
        scores = [
            {**score, **scorer.distances(block.images), **scorer.inception_style_score(block.images)}
            for score, block in zip(scores, blocks, strict=True)
        ]
    means = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
    return {
        "sampler": sampling.sampler,
        "weights": blocks[0].weights,
        "steps": sampling.steps,
        "eta": sampling.eta or "",
        "guidance_scale": sampling.guidance_scale,
        "guidance": _guidance_kind(sampling),
        "n": count,
        "seed_blocks": len(blocks),
        "note": note,
        **means,
    }


def _too_few(count: int, scorer: Scorer) -> str:
    needed = IMAGES_PER_DIMENSION * scorer.dimensions
    return "" if count >= needed else f"too few images for distances ({needed} needed)"


def _csv(columns: list[str], rows: Iterable[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()})
    return text.getvalue()


def grid_of(drawn: Draw, classes: list[str]) -> Image.Image:
    """Return a grid with one titled column per class; plain rows without labels or with too many classes."""
    from models.images.pictures import grid

    rows = len(drawn.pixels) // max(1, len(classes))
    if drawn.labels is None or not rows or len(classes) > MAX_GRID_CLASSES:
        return grid(*_shown(drawn.pixels[: GRID_ROWS * PLAIN_GRID_COLUMNS], PLAIN_GRID_COLUMNS))
    shown = drawn.pixels[: min(rows, GRID_ROWS) * len(classes)]
    return grid(*_shown(shown, len(classes)), column_titles=classes)


def _shown(pixels: np.ndarray, columns: int) -> tuple[np.ndarray, int, int]:
    """Return arguments of `grid`: images shrunk to twice `GRID_SIDE` at most, columns, and the scale of a tile."""
    from models.images.pictures import shrunk

    small = shrunk(pixels, 2 * GRID_SIDE)
    return small, columns, max(1, GRID_SIDE // small.shape[-1])


def _grid_of_control(controlled: Controlled) -> Image.Image:
    """Return control maps above their images, and above what is drawn with, without, and with another map."""
    from models.images.pictures import grid

    rows = controlled.rows
    return grid(*_shown(rows.reshape(-1, *rows.shape[2:]), rows.shape[1]), controlled.titles)


def grid_of_nearest(drawn: Draw, scorer: Scorer) -> Image.Image:
    """Return the images nearest to a training image by features, each above that training image."""
    import numpy as np

    from models.images.pictures import grid

    rows, distances = scorer.nearest_training(drawn.images)
    chosen = np.argsort(distances, kind="stable")[:NEAREST]
    both = np.concatenate([drawn.pixels[chosen], scorer.train.at(rows[chosen])])
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
    if parity := measured.precision_parity:
        print(
            f"evaluate: precision {measured.precision} agrees with float32 to {parity.psnr_db:.1f} dB over {parity.n} "
            f"images of the same seeds (worst {parity.worst_psnr_db:.1f} dB)"
        )
    if parity := measured.compile_parity:
        print(
            f"evaluate: the compiled network agrees with the uncompiled one to {parity.psnr_db:.1f} dB over {parity.n} "
            f"images of the same seeds (worst {parity.worst_psnr_db:.1f} dB)"
        )
    if control := measured.control:
        print(
            f"evaluate: agreement with control maps ({control.kind}) {control.value:.3f} +- {control.spread:.2g} (with "
            f"another map {control.shuffled:.3f}, without {control.base:.3f}, real images {control.real:.3f})"
        )


if __name__ == "__main__":
    stage.main(evaluate)
