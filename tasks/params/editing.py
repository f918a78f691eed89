"""Parameters of the section `edit`: image-to-image and inpainting of held-out images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from tasks.params.section import DrawingPrecision, Fraction, PositiveInt, Sampler, Section, Seed

if TYPE_CHECKING:
    from models.noise.samplers import Sampling

Mask = Literal["centre", "half", "strokes"]
Count = Annotated[int, Field(ge=0)]


class EditParams(Section):
    """Editing of held-out images, and its measurement."""

    n_images: Count = 40
    """Held-out images that are edited, at most half of them; the others are the reference. 0 disables the stage."""
    strengths: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        default=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), strict=False
    )
    """Strengths of image-to-image, increasing; empty leaves it out."""
    masks: tuple[Mask, ...] = Field(default=("centre", "half", "strokes"), strict=False)
    """Masks of inpainting; empty leaves it out."""
    sampler: Sampler = "dpm_solver_pp_2m"
    """Sampler of the edits."""
    steps: PositiveInt = 10
    """Steps from pure noise; a strength takes its share of them."""
    eta: Fraction = 0.0
    """Stochasticity of 'ddim': 0 is deterministic, 1 has the variance of 'ddpm'."""
    guidance_scale: Annotated[float, Field(ge=1)] = 1.0
    """Classifier-free guidance; 1 is none."""
    resampling: PositiveInt = 2
    """How often each stretch of `jump` steps of inpainting is taken (RePaint, Lugmayr et al. 2022)."""
    jump: PositiveInt = 1
    """Steps of a stretch that is taken repeatedly, see `resampling`."""
    feather: Count = 2
    """Width in pixels of the blended seam inside a mask."""
    batch_size: PositiveInt = 64
    """Images that are edited at a time."""
    precision: DrawingPrecision = "no"
    """Precision of the network that draws."""
    seed: Seed = 11
    """Seed of the noise."""

    @model_validator(mode="after")
    def _check(self) -> EditParams:
        if self.n_images == 1:
            raise ValueError("edit.n_images 1 is too few for a distance; raise it to 2 or more, or set it to 0")
        if list(self.strengths) != sorted(set(self.strengths)):
            raise ValueError(f"edit.strengths {list(self.strengths)} must increase; sort them and remove repetitions")
        if len(set(self.masks)) < len(self.masks):
            raise ValueError(f"edit.masks {list(self.masks)} names a mask twice; remove one")
        if self.strengths and int(self.steps * self.strengths[0]) < 1:
            raise ValueError(
                f"edit.strengths {self.strengths[0]:g} takes none of edit.steps {self.steps}; raise the strength to "
                f"{1 / self.steps:.3g}, or the steps"
            )
        if self.eta and self.sampler != "ddim":
            raise ValueError("edit.eta is only read by edit.sampler 'ddim'; set it back to 0.0")
        return self

    @property
    def enabled(self) -> bool:
        """Whether there is anything to edit."""
        return self.n_images > 0 and bool(self.strengths or self.masks)

    @property
    def sampling(self) -> Sampling:
        """Sampler, steps and guidance."""
        from models.noise.samplers import Sampling  # imports NumPy, which loading parameters does not need

        return Sampling(self.sampler, self.steps, self.eta, self.guidance_scale)
