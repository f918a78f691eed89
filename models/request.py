"""A request for images, checked against a model and drawn by it.

The command `python -m tasks.draw`, the registered model and the ONNX bundle draw through `draw`. The bundle contains a
copy of this file, so it imports only NumPy and its neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

import numpy as np

from .masks import default_strength
from .noise.editing import require_strength
from .noise.samplers import DEFAULT_SAMPLING, Sampling

if TYPE_CHECKING:
    from .noise.samplers import Callback

Item = TypeVar("Item")
Label: TypeAlias = "int | str"
"""A class by its index or its name."""


class Described(Protocol):
    """What a model draws: the fields that `PipelineInfo` and `BundleInfo` share."""

    @property
    def conditioning(self) -> str: ...
    @property
    def classes(self) -> list[str]: ...
    @property
    def prompts(self) -> list[str] | None: ...
    @property
    def channels(self) -> int: ...
    @property
    def size(self) -> int: ...


class Model(Protocol):
    """What draws: a pipeline of PyTorch or an ONNX bundle."""

    @property
    def info(self) -> Described: ...

    def paint(self, drawing: Drawing, callback: Callback | None = None) -> np.ndarray:
        """Draw the images of a checked request, float32 [N, C, H, W], about [-1, 1]."""


@dataclass(frozen=True)
class Request:
    """Images as a user asks for them. Seeds, labels and prompts are one for all images, or one for each."""

    seeds: Sequence[int] = (0,)
    """Seeds of the noise; seed, label and prompt of an image determine it."""
    labels: Sequence[Label] = ()
    """Names or indices of classes."""
    prompts: Sequence[str] = ()
    """For a class-conditional model, texts that name one class each."""
    negative_prompt: str = ""
    """Reference of classifier-free guidance in place of the empty prompt; for text-conditional models."""
    sampling: Sampling = DEFAULT_SAMPLING
    """Sampler, steps and guidance."""
    image: np.ndarray | None = None
    """What to begin with, uint8 [C, S, S] in the model's size; None begins with noise."""
    strength: float | None = None
    """Share of the steps that change the image, in (0, 1]; None takes the default, see `masks.default_strength`."""
    mask: np.ndarray | None = None
    """bool [S, S], true where the image is painted anew; None paints all of it."""
    control: np.ndarray | None = None
    """Map for a ControlNet, uint8 [1 or 3, h, w]; None draws without the ControlNet."""
    control_scale: float | None = None
    """Weight of the ControlNet; None is 1."""


@dataclass(frozen=True)
class Given:
    """What N images begin with."""

    images: np.ndarray
    """uint8 [N, C, S, S]."""
    strength: float
    mask: np.ndarray | None
    """bool [S, S]."""


@dataclass(frozen=True)
class Drawing:
    """A request that fits the model, with one entry for each of the N images."""

    seeds: list[int]
    """Seeds of the noise, N."""
    labels: list[int] | None
    """Class indices; None without."""
    prompts: list[str] | None
    """Texts for a text-conditional model; None without."""
    negative_prompt: str
    """See `Request.negative_prompt`."""
    sampling: Sampling
    """Sampler, steps and guidance."""
    given: Given | None
    """Image and mask to begin with; None begins with noise."""
    control: np.ndarray | None
    """uint8 [1, 1 or 3, h, w], for all images."""
    control_scale: float
    """Weight of the ControlNet."""


def draw(model: Model, request: Request, callback: Callback | None = None) -> np.ndarray:
    """Draw the images of a request, float32 [N, C, H, W], about [-1, 1].

    Image i depends on its seed, its label or prompt, and the settings, not on the other images. `callback(i, t, x, x0)`
    is called after each step of each batch, see `noise/samplers.py`.

    Raises:
        ValueError: for a request that the model cannot fulfil, in one sentence.
    """
    return model.paint(resolve(request, model.info), callback)


def resolve(request: Request, info: Described) -> Drawing:
    """Check a request against the model.

    Raises:
        ValueError: for a combination that the model does not support.
    """
    count = max(len(request.seeds), len(request.labels), len(request.prompts))
    seeds = _for_each(request.seeds, count, "seeds")
    if not seeds or min(seeds) < 0:
        raise ValueError(f"seeds {list(request.seeds)} must be one or more integers from 0 on")
    _check_negative(request, info)
    _check_control(request)
    labels, prompts = _condition(request, info)
    return Drawing(
        seeds=seeds,
        labels=None if labels is None else _for_each(labels, count, "labels"),
        prompts=None if prompts is None else _for_each(prompts, count, "prompts"),
        negative_prompt=request.negative_prompt,
        sampling=request.sampling,
        given=_given(request, count),
        control=None if request.control is None else request.control[None],
        control_scale=1.0 if request.control_scale is None else request.control_scale,
    )


def _check_control(request: Request) -> None:
    if request.control is None and request.control_scale is not None:
        raise ValueError("a control scale weighs a control map; give one, or leave it out")
    if request.control is not None and request.image is not None:
        raise ValueError("a control map and an image to begin with cannot be combined; leave one out")


def _given(request: Request, count: int) -> Given | None:
    """Return the image to begin with for each of `count` images; None without one."""
    image, strength, mask = request.image, request.strength, request.mask
    if image is None:
        if strength is not None or mask is not None:
            raise ValueError(
                f"a {'mask' if mask is not None else 'strength'} changes an image; give one, or leave it out"
            )
        return None
    if strength is not None:
        require_strength(strength)
    images = np.broadcast_to(image, (count, *image.shape))
    return Given(images, default_strength(mask) if strength is None else strength, mask)


def _for_each(values: Sequence[Item], count: int, name: str) -> list[Item]:
    """Return `count` values: those given, or the only one repeated."""
    if len(values) not in (1, count):
        raise ValueError(f"{len(values)} {name} do not fit {count} images; give one for all or one for each")
    return [*values] if len(values) == count else [*values] * count


def _condition(request: Request, info: Described) -> tuple[list[int] | None, Sequence[str] | None]:
    """Return class indices, or prompts for a text-conditional model; two Nones for an unconditional model."""
    if request.labels and request.prompts:
        raise ValueError("give label or prompt, not both")
    if info.conditioning == "none":
        if request.labels or request.prompts:
            raise ValueError("this model is unconditional; ask for images without label or prompt")
        return None, None
    if info.conditioning == "text":
        return _text(request, info)
    if not request.labels and not request.prompts:
        raise ValueError(f"this model needs a label for each image: {_known(info)}")
    if request.prompts:
        return [label_of(prompt, info.classes) for prompt in request.prompts], None
    return [_index(label, info) for label in request.labels], None


def _text(request: Request, info: Described) -> tuple[list[int] | None, Sequence[str] | None]:
    if request.prompts:
        return None, request.prompts
    if not request.labels:
        raise ValueError("this model draws text; give a prompt for each image")
    if not info.prompts:
        raise ValueError("this model takes no labels, because its captions name no classes; give prompts")
    return [_index(label, info) for label in request.labels], None


def _index(label: Label, info: Described) -> int:
    """Return the index of a class; the one after the last class is the null condition."""
    if isinstance(label, str):
        names = [name.casefold() for name in info.classes]
        if label.casefold() in names:
            return names.index(label.casefold())
        if not re.fullmatch(r"-?\d+", label, re.ASCII):
            raise ValueError(f"label {label!r} is no class of this model; {_known(info)}")
    index = int(label)
    if not 0 <= index <= len(info.classes):
        raise ValueError(_known(info))
    return index


def _known(info: Described) -> str:
    shown = ", ".join(info.classes[:20]) + (", ..." if len(info.classes) > 20 else "")
    return f"labels must lie between 0 and {len(info.classes) - 1} ({shown})"


def _check_negative(request: Request, info: Described) -> None:
    if not request.negative_prompt:
        return
    if info.conditioning != "text":
        raise ValueError("a negative prompt needs a text-conditional model; leave it out")
    if request.sampling.guidance_scale == 1 or request.sampling.guidance != "classifier_free":
        raise ValueError(
            "a negative prompt acts through classifier-free guidance; set a guidance scale other than 1 and not the "
            "kind 'auto', or leave it out"
        )


def label_of(prompt: str, classes: Sequence[str]) -> int:
    """Return the class whose name `prompt` contains as whole words, in any case.

    If one name contains another ("hot dog", "dog"), the longer one counts.

    Raises:
        ValueError: if no class or more than one is named.
    """
    spans = [
        (match.start(), match.end(), label)
        for label, name in enumerate(classes)
        for match in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", prompt, re.IGNORECASE)
    ]
    named = {
        label
        for start, end, label in spans
        if not any(s <= start and end <= e and (s, e) != (start, end) for s, e, _ in spans)
    }
    if len(named) != 1:
        found = f"names {', '.join(classes[label] for label in sorted(named))}" if named else "names no class"
        raise ValueError(f"prompt {prompt!r} {found}; name exactly one of: {', '.join(classes) or '(none known)'}")
    return named.pop()
