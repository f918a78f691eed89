"""Sampling that begins at a given image: image-to-image, and inpainting with RePaint's resampling.

Works with every sampler of `samplers.py`, on torch tensors and NumPy arrays alike. The ONNX bundle contains a copy of
this file, so it imports only NumPy and its neighbours. Legend as in `samplers.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from .paths import Level
    from .samplers import After, Batch, Callback, Noise

Run: TypeAlias = Callable[..., Any]
"""`run(x, noise, levels, after)`: a sampler with its `denoise` and options; returns x at the last of the levels."""


@dataclass(frozen=True)
class Start:
    """The given images that sampling begins with, and how much of them it keeps.

    Without a mask this is image-to-image (Meng et al. 2022, SDEdit). With a mask, the region to keep is replaced after
    each step by the given image at the noise level of that step (Lugmayr et al. 2022, eq. 8).

    Raises:
        ValueError: for a strength outside (0, 1], a mask of another size than the images, or an impossible resampling.
    """

    x0: Batch
    """Given images in the network's input space, float [N, C, H, W]."""
    strength: float = 1.0
    """Share of the steps that are taken, in (0, 1]. At 1 the masked region begins at pure noise; without a mask
    something of the image remains if the first noise level has a signal, as in diffusers."""
    mask: Batch = None
    """float [N, 1, H, W] in [0, 1]: 1 is painted anew, 0 is kept; None paints everything anew."""
    resampling: int = 1
    """U: how often each stretch of `jump` steps is taken (Lugmayr et al. 2022, algorithm 1); 1 takes each once."""
    jump: int = 1
    """j: number of steps that a repetition goes back."""

    def __post_init__(self) -> None:
        require_strength(self.strength)
        if self.resampling < 1 or self.jump < 1:
            raise ValueError(f"resampling {self.resampling} and jump {self.jump} must be at least 1")
        if self.mask is None:
            if self.resampling > 1:
                raise ValueError(f"resampling {self.resampling} repeats steps of inpainting; give a mask")
        elif tuple(self.mask.shape) != (len(self.x0), 1, *self.x0.shape[2:]):
            raise ValueError(
                f"the mask has the shape {tuple(self.mask.shape)}; for these images it must have "
                f"{(len(self.x0), 1, *self.x0.shape[2:])}"
            )

    def rows(self, part: slice) -> Start:
        """Return the start of some of the images."""
        return replace(self, x0=self.x0[part], mask=None if self.mask is None else self.mask[part])


def require_strength(strength: float) -> None:
    """Raise `ValueError` for a strength outside (0, 1]."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength {strength:g} must lie above 0 and not above 1")


def steps_of(strength: float, steps: int) -> int:
    """Return how many of `steps` are taken at this strength: the rule of diffusers, rounded down.

    Raises:
        ValueError: if none would be.
    """
    taken = min(int(steps * strength), steps)
    if taken < 1:
        raise ValueError(f"strength {strength:g} takes none of {steps} steps; it must be at least {1 / steps:.3g}")
    return taken


def stretches(steps: int, jump: int, resampling: int) -> list[tuple[int, int]]:
    """Return RePaint's order of steps as stretches (first, end) of level indices; consecutive ones overlap.

    Index 0 is the noisiest level and `steps` the clean image. After the steps that end 1, 1 + j, 1 + 2j, ... levels
    above the clean image, sampling goes j levels back, U - 1 times each; no jump goes above index 0. This is the
    schedule of the authors' code, and for j = 1 algorithm 1 of Lugmayr et al. 2022.
    """
    found, first = [], 0
    for end in sorted(range(steps - 1, jump - 1, -jump)):
        for _ in range(resampling - 1):
            found.append((first, end))
            first = end - jump
    return [*found, (first, steps)]


def noised(x0: Batch, level: Level, eps: Batch) -> Batch:
    """Return x_t = alpha x_0 + sigma eps, the given image at a noise level."""
    return level.alpha * x0 + level.sigma * eps


def renoised(x: Batch, level: Level, noisier: Level, eps: Batch) -> Batch:
    """Return a sample of q(x_t | x_s) for s = `level`, t = `noisier`: several forward steps at once."""
    scale = noisier.alpha / level.alpha
    return scale * x + math.sqrt(max(noisier.sigma**2 - (scale * level.sigma) ** 2, 0.0)) * eps


def watching(callback: Callback | None, first: int = 0) -> After | None:
    """Return a hook of samplers that calls `callback` with step numbers from `first` on and changes nothing."""
    if callback is None:
        return None

    def after(i: int, t: float, x: Batch, x0: Batch) -> None:
        callback(first + i, t, x, x0)

    return after


def keeping(start: Start, levels: Sequence[Level], noise: Noise, after: After | None) -> After:
    """Return a hook of samplers that replaces the region outside the mask by the given image, before `after`.

    `noise` returns the noise of the given image at the next of `levels`.
    """

    def replaced(i: int, t: float, x: Batch, x0: Batch) -> Batch:
        known = noised(start.x0, levels[i + 1], noise())
        x = (1 - start.mask) * known + start.mask * x
        if after:
            after(i, t, x, x0)
        return x

    return replaced


def sample_from(
    start: Start, run: Run, noise: Noise, levels: Sequence[Level], callback: Callback | None = None
) -> Batch:
    """Draw images from given ones, float [N, C, H, W]; `levels` are those of sampling from pure noise, with `CLEAN`.

    The first call of `noise` is the noise of the given image. Without resampling it stays that at every level, as in
    diffusers; with resampling each level has fresh noise (Lugmayr et al. 2022, algorithm 1, line 4). After a jump the
    sampler starts anew, so that a multistep solver does not use predictions from before it.

    Raises:
        ValueError: if the strength leaves no step.
    """
    levels = levels[-1 - steps_of(start.strength, len(levels) - 1) :]
    first = noise()
    if start.mask is None:
        return run(noised(start.x0, levels[0], first), noise, levels, watching(callback))
    x = first if start.strength == 1 else noised(start.x0, levels[0], first)
    of_known = noise if start.resampling > 1 else lambda: first
    done, reached = 0, 0
    for begin, end in stretches(len(levels) - 1, start.jump, start.resampling):
        part = levels[begin : end + 1]
        if begin < reached:
            x = renoised(x, levels[reached], part[0], noise())
        x = run(x, noise, part, keeping(start, part, of_known, watching(callback, done)))
        done, reached = done + end - begin, end
    return x
