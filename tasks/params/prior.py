"""Parameters of DreamBooth: the section `prior`, and what the stage of that name reads of other sections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from tasks.params.section import DrawingPrecision, PositiveInt, Sampler, Section, Seed

if TYPE_CHECKING:
    from models.noise.samplers import Sampling


class PriorParams(Section):
    """The subject of DreamBooth, and the class images that preserve the prior (Ruiz et al. 2023).

    Without `instance_prompt` a training is not one of DreamBooth, and the rest is not read.
    """

    instance_prompt: str | None = None
    """The prompt of the subject's pictures, such as 'a photo of sks dog'."""
    class_prompt: str | None = None
    """The prompt of the class images, such as 'a photo of dog'; null draws none."""
    token: str = "sks"  # noqa: S105 - a word of a prompt
    """The rare word of `instance_prompt` that comes to mean the subject."""
    subject: str | None = None
    """Class whose training images are the subject's pictures; null takes all training images."""
    contexts: tuple[str, ...] = Field(default=(), strict=False)
    """Held-out prompts with the token, of other contexts and styles, such as 'a painting of sks dog'."""
    images: Annotated[int, Field(ge=0)] = 200
    """Class images that the base draws."""
    measured: Annotated[int, Field(ge=2)] = 32
    """Samples of each prompt that measure the subject, and of the class before the training."""
    sampler: Sampler = "dpm_solver_pp_2m"
    """Sampler of class images and measured samples."""
    steps: PositiveInt = 25
    """Sampling steps."""
    guidance_scale: Annotated[float, Field(ge=1)] = 3.0
    """w of the classifier-free guidance; 1 is none."""
    batch_size: PositiveInt = 16
    """Images that are drawn at a time."""
    precision: DrawingPrecision = "no"
    """Precision of the network that draws the class images."""
    seed: Seed = 500
    """First seed of class images and measured samples."""

    @property
    def sampling(self) -> Sampling:
        """The settings with which class images, and the samples that measure the subject, are drawn."""
        from models.noise.samplers import Sampling  # imports NumPy, which loading parameters does not need

        return Sampling(self.sampler, self.steps, guidance_scale=self.guidance_scale)

    @model_validator(mode="after")
    def _check(self) -> PriorParams:
        if self.instance_prompt is None:
            if self.class_prompt or self.subject or self.contexts:
                raise ValueError(
                    "prior.class_prompt, prior.subject and prior.contexts are only read with prior.instance_prompt; "
                    "set that, or reset them"
                )
            return self
        for key, prompts in {"prior.instance_prompt": (self.instance_prompt,), "prior.contexts": self.contexts}.items():
            if missing := [prompt for prompt in prompts if self.token not in prompt.split()]:
                raise ValueError(f"{key} {missing[0]!r} lacks the word {self.token!r} of prior.token; add it")
        if self.class_prompt is not None and self.token in self.class_prompt.split():
            raise ValueError(
                f"prior.class_prompt {self.class_prompt!r} contains prior.token {self.token!r}, which is to mean the "
                "subject alone; remove it"
            )
        if self.images and self.class_prompt is None:
            raise ValueError(
                "prior.images are drawn by prior.class_prompt, which is null; set it, or prior.images to 0"
            )
        return self
