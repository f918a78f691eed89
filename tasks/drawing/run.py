"""What the command does: options -> settings -> images -> files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.device import best_device
from models.networks.precision import in_precision
from models.parallel import LEAST_IMAGES
from models.request import draw
from tasks.drawing import adapters, output, place, plan
from tasks.drawing.options import MODEL, Options
from tasks.drawing.painter import Painter
from tasks.drawing.settings import read_settings
from tasks.runtime import arithmetic
from tasks.runtime.errors import StageError
from tasks.runtime.progress import progress

if TYPE_CHECKING:
    import torch

    from models.noise.samplers import Callback
    from models.pipeline import Pipeline
    from tasks.drawing.output import Layout
    from tasks.drawing.plan import Plan
    from tasks.drawing.settings import Adapter, Settings

PROGRESS_SECONDS = 5
"""Drawings that take longer show a progress bar."""


def run(options: Options) -> None:
    """Draw what the options ask for and write it.

    Raises:
        StageError: for options that the model does not support, a model or file that is missing or damaged, or an
            output that exists.
    """
    out = output.check(options.out, options.force)
    like = read_settings(options.like) if options.like else None
    found = place.find(options.model or (like.model if like else MODEL))
    loras = _adapters(options, like)
    pipeline = place.open_pipeline(found, best_device())
    if like and not options.model and like.train_key != pipeline.info.train_key:
        print(f"draw: {found.name} has other weights than those of {options.like}", flush=True)
    try:
        settings = plan.settings_of(options, like, found, pipeline.info).model_copy(update={"lora": loras})
        planned = plan.prepare(settings, pipeline.info, options.scale)  # before adapters are merged, which takes time
        arithmetic.check_precision("--precision", settings.precision, pipeline.device)
        adapters.merge(pipeline, loras)
        pipeline = in_precision(pipeline, settings.precision)
        if output.is_animation(out):
            output.write_animation(out, _frames(pipeline, planned), planned.layout)
        else:
            _write(out, _drawn(pipeline, planned), planned.layout, options.scale, settings)
    except ValueError as error:
        raise StageError(str(error)) from None
    except OSError as error:
        raise StageError(f"--out {out} cannot be written ({error.strerror or error}); choose another place") from None
    print(f"draw: wrote {out} ({_sentence(settings)})")


def _adapters(options: Options, like: Settings | None) -> tuple[Adapter, ...]:
    """Return the adapters of the options, else those of the settings, whose files must not have changed."""
    if options.lora is not None:
        try:
            return adapters.described([adapters.parse(text) for text in options.lora])
        except ValueError as error:
            raise StageError(str(error)) from None
    before = like.lora if like else ()
    now = adapters.described([(Path(adapter.path), adapter.weight) for adapter in before])
    for old, new in zip(before, now, strict=True):
        if old != new:
            raise StageError(f"{old.path} is not the adapter that {options.like} was drawn with; give --lora")
    return now


def _drawn(pipeline: Pipeline, planned: Plan) -> np.ndarray:
    painter = Painter(pipeline)
    with _bar(planned) as step:
        return draw(painter, planned.request, step)


def _frames(pipeline: Pipeline, planned: Plan) -> list[np.ndarray]:
    """Return x after each step, decoded, and the finished images: float [N, C, H, W] each."""
    # One thread draws a batch this small, so that the parts of a step arrive in their order.
    painter, seen = Painter(pipeline, most=2 * LEAST_IMAGES - 1), dict[int, list[np.ndarray]]()

    with _bar(planned) as step:

        def callback(i: int, t: float, x: torch.Tensor, x0: torch.Tensor) -> None:
            seen.setdefault(i, []).append(pipeline.decode(x).float().cpu().numpy())
            step(i, t, x, x0)

        images = draw(painter, planned.request, callback)
    return [*(np.concatenate(seen[i]) for i in sorted(seen)[:-1]), images]


@contextmanager
def _bar(planned: Plan) -> Iterator[Callback]:
    """Show the steps of all images, if they take long."""
    with progress(desc="draw", total=planned.steps, unit="step", delay=PROGRESS_SECONDS) as bar:
        yield lambda i, t, x, x0: bar.update(len(x))


def _write(out: Path, images: np.ndarray, layout: Layout, scale: int | None, settings: Settings) -> None:
    if out.suffix:
        output.write_png(out, images, layout, scale, settings)
    else:
        output.write_folder(out, images, scale, list(_each(settings)))


def _each(settings: Settings) -> Iterator[Settings]:
    """Yield the settings of each image alone, in the order of the request."""
    columns: list[dict[str, object]] = [{"labels": (label,)} for label in settings.labels]
    columns += [{"prompts": (prompt,)} for prompt in settings.prompts]
    for seed in settings.seeds:
        for column in columns or [{}]:
            yield settings.model_copy(update={"seeds": (seed,), **column})


def _sentence(settings: Settings) -> str:
    seeds = len(settings.seeds) * max(1, len(settings.labels), len(settings.prompts))
    return (
        f"{seeds} image{'s' if seeds > 1 else ''}, {settings.sampler}, {settings.steps} steps, guidance "
        f"{settings.guidance:g}"
    )
