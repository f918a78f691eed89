"""What is drawn: options of a user, completed by the model's defaults -> settings -> a checked request.

The command `python -m tasks.draw` and the page of `python -m infra.demo` draw what `prepare` returns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from models.masks import default_strength
from models.noise.editing import steps_of
from models.request import Request, resolve
from tasks.drawing import defaults, inputs
from tasks.drawing.options import MAX_IMAGES, Options
from tasks.drawing.output import Layout
from tasks.drawing.settings import Settings
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from models.noise.samplers import Sampling
    from models.pipeline import PipelineInfo
    from tasks.drawing.place import Place
    from tasks.drawing.settings import File


@dataclass(frozen=True)
class Plan:
    """A request that the model can fulfil, and the arrangement of its images."""

    settings: Settings
    request: Request
    titles: list[str]
    """One for each label or prompt: names of classes, or prompts; empty without."""
    layout: Layout

    @property
    def steps(self) -> int:
        """Sampling steps of all images together."""
        asked = self.request
        steps = asked.sampling.steps
        if asked.image is not None:
            steps = steps_of(default_strength(asked.mask) if asked.strength is None else asked.strength, steps)
        return len(asked.seeds) * steps


def prepare(settings: Settings, info: PipelineInfo, scale: int | None = None) -> Plan:
    """Read the files that the settings name, and check the request against the model.

    Raises:
        StageError: for files that are not images, or that do not fit the model or each other.
        ValueError: for a combination that the model does not support.
    """
    image, mask = inputs.load(settings, info)
    request = replace(_request(settings), image=image, mask=mask, control=inputs.load_control(settings, info))
    resolve(request, info)
    titles = _titles(settings, info)
    return Plan(settings, request, titles, Layout.of(settings.seeds, titles, info.size, scale))


def settings_of(options: Options, like: Settings | None, found: Place, info: PipelineInfo) -> Settings:
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
        "precision": options.precision or base.precision,
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
