"""What the command does: options -> settings -> images -> files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.device import best_device
from models.masks import default_strength
from models.noise.editing import steps_of
from models.parallel import LEAST_IMAGES
from models.request import Request, draw, resolve
from tasks.drawing import adapters, defaults, inputs, output, place
from tasks.drawing.options import MAX_IMAGES, MODEL, Options
from tasks.drawing.output import Layout
from tasks.drawing.painter import Painter
from tasks.drawing.settings import Settings, read_settings
from tasks.runtime.errors import StageError
from tasks.runtime.progress import progress

if TYPE_CHECKING:
    import torch

    from models.noise.samplers import Callback, Sampling
    from models.pipeline import Pipeline, PipelineInfo
    from tasks.drawing.place import Place
    from tasks.drawing.settings import Adapter, File

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
        settings = _settings(options, like, found, pipeline.info).model_copy(update={"lora": loras})
        image, mask = inputs.load(settings, pipeline.info)
        control = inputs.load_control(settings, pipeline.info)
        request = replace(_request(settings), image=image, mask=mask, control=control)
        resolve(request, pipeline.info)  # before adapters are merged, which takes time
        adapters.merge(pipeline, loras)
        layout = Layout.of(settings.seeds, _titles(settings, pipeline.info), pipeline.info.size, options.scale)
        if output.is_animation(out):
            output.write_animation(out, _frames(pipeline, request), layout)
        else:
            _write(out, _drawn(pipeline, request), layout, options.scale, settings)
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


def _settings(options: Options, like: Settings | None, found: Place, info: PipelineInfo) -> Settings:
    """Combine the options with what they leave out: the settings of --like, else the model's defaults."""
    base = like or _defaults(found, info)
    labels: tuple[int | str, ...] = tuple(options.label or ())
    prompts = tuple(options.prompt or ())
    if not labels and not prompts:
        labels, prompts = (like.labels, like.prompts) if like else defaults.conditions(info)
    seeds = tuple(options.seed) if options.seed else base.seeds
    if options.count is not None:
        seeds = tuple(range(seeds[0], seeds[0] + options.count))
    sampler = options.sampler or base.sampler
    interval = tuple(options.guidance_interval) if options.guidance_interval else base.guidance_interval
    chosen = {
        "model": found.name,
        "train_key": info.train_key,
        "labels": labels,
        "prompts": prompts,
        "negative_prompt": base.negative_prompt if options.negative_prompt is None else options.negative_prompt,
        "seeds": seeds,
        "sampler": sampler,
        "steps": options.steps or base.steps,
        "eta": (base.eta if sampler == base.sampler else 0.0) if options.eta is None else options.eta,
        "guidance": base.guidance if options.guidance is None else options.guidance,
        "guidance_interval": interval,
        "guidance_kind": options.guidance_kind or base.guidance_kind,
    }
    settings = Settings.model_validate(chosen | _beginning(options, base))
    if (count := len(settings.seeds) * max(1, len(labels), len(prompts))) > MAX_IMAGES:
        raise StageError(f"{count} images are more than {MAX_IMAGES}; draw them in several calls")
    return settings


def _beginning(options: Options, base: Settings) -> dict[str, object]:
    """Return image, strength and mask of the options, else those of --like, whose files must not have changed."""
    like = options.like or Path()
    image, strength = base.image, base.strength if options.strength is None else options.strength
    image = inputs.described(options.image, "--image") if options.image else inputs.unchanged(image, "--image", like)
    mask, rectangle = base.mask, base.mask_rectangle
    if options.mask:
        mask, rectangle = inputs.described(options.mask, "--mask"), None
    elif options.mask_rectangle:
        mask, rectangle = None, inputs.parse_rectangle(options.mask_rectangle)
    else:
        mask = inputs.unchanged(mask, "--mask", like)
    return {
        "image": image,
        "strength": strength,
        "mask": mask,
        "mask_rectangle": rectangle,
        "control_scale": base.control_scale if options.control_scale is None else options.control_scale,
        **_control(options, base, like),
    }


def _control(options: Options, base: Settings, like: Path) -> dict[str, File | None]:
    """Return the control map, or the image to make it from, of the options, else those of --like."""
    if options.control:
        return {"control": inputs.described(options.control, "--control"), "control_from": None}
    if options.control_from:
        return {"control": None, "control_from": inputs.described(options.control_from, "--control-from")}
    return {
        "control": inputs.unchanged(base.control, "--control", like),
        "control_from": inputs.unchanged(base.control_from, "--control-from", like),
    }


def _defaults(found: Place, info: PipelineInfo) -> Settings:
    sampling = defaults.sampling(found, info)
    return Settings(
        model=found.name,
        train_key=info.train_key,
        seeds=(0,),
        sampler=sampling.sampler,
        steps=sampling.steps,
        eta=sampling.eta,
        guidance=sampling.guidance_scale,
        guidance_interval=_pair(sampling),
        guidance_kind=sampling.guidance,
    )


def _pair(sampling: Sampling) -> tuple[float, float] | None:
    interval = sampling.guidance_interval
    return None if interval is None else (interval[0], interval[1])


def _request(settings: Settings) -> Request:
    """Return the request for each label or prompt with each seed, seed by seed."""
    columns = max(1, len(settings.labels), len(settings.prompts))
    return Request(
        seeds=[seed for seed in settings.seeds for _ in range(columns)],
        labels=settings.labels * len(settings.seeds),
        prompts=settings.prompts * len(settings.seeds),
        negative_prompt=settings.negative_prompt,
        sampling=settings.sampling,
        strength=settings.strength,
        control_scale=settings.control_scale,
    )


def _titles(settings: Settings, info: PipelineInfo) -> list[str]:
    """Return a title for each column: names of classes, or prompts."""
    named = resolve(Request(labels=settings.labels, prompts=settings.prompts), info)
    if named.prompts is not None:
        return list(settings.prompts)
    return [[*info.classes, "no class"][label] for label in named.labels or ()]


def _drawn(pipeline: Pipeline, request: Request) -> np.ndarray:
    painter = Painter(pipeline)
    with _bar(request) as step:
        return draw(painter, request, step)


def _frames(pipeline: Pipeline, request: Request) -> list[np.ndarray]:
    """Return x after each step, decoded, and the finished images: float [N, C, H, W] each."""
    # One thread draws a batch this small, so that the parts of a step arrive in their order.
    painter, seen = Painter(pipeline, most=2 * LEAST_IMAGES - 1), dict[int, list[np.ndarray]]()

    with _bar(request) as step:

        def callback(i: int, t: float, x: torch.Tensor, x0: torch.Tensor) -> None:
            seen.setdefault(i, []).append(pipeline.decode(x).float().cpu().numpy())
            step(i, t, x, x0)

        images = draw(painter, request, callback)
    return [*(np.concatenate(seen[i]) for i in sorted(seen)[:-1]), images]


@contextmanager
def _bar(request: Request) -> Iterator[Callback]:
    """Show the steps of all images, if they take long."""
    steps = request.sampling.steps
    if request.image is not None:
        steps = steps_of(default_strength(request.mask) if request.strength is None else request.strength, steps)
    with progress(desc="draw", total=len(request.seeds) * steps, unit="step", delay=PROGRESS_SECONDS) as bar:
        yield lambda i, t, x, x0: bar.update(len(x))


def _write(out: Path, images: np.ndarray, layout: Layout, scale: int | None, settings: Settings) -> None:
    if out.suffix:
        output.write_png(out, images, layout, scale, settings)
    else:
        output.write_folder(out, images, scale, list(_each(settings)))


def _each(settings: Settings) -> Iterator[Settings]:
    """Yield the settings of each image alone, in the order of `_request`."""
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
