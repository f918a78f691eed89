"""What a user fills in, as the browser sends it -> the options of `python -m tasks.draw`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from infra.demo.live import MOST_IMAGES
from tasks.drawing.options import Options
from tasks.runtime.errors import StageError

MOST_CHARACTERS = 100_000
"""Longest text of prompts."""
MOST_STEPS = 10_000
"""Flows have no limit of their own."""
LARGEST_SEED = 2**53 - 1
"""Largest integer that JavaScript represents exactly."""
AnyModel = TypeVar("AnyModel", bound=BaseModel)


class Form(BaseModel):
    """The settings of the page, in the order of its inputs; None for a number that the user cleared."""

    model_config = ConfigDict(frozen=True)

    model: str
    labels: list[str] | None
    prompts: str | None
    """A prompt in each line."""
    negative_prompt: str | None
    seed: int | None
    count: int | None
    sampler: str | None
    steps: int | None
    guidance: float | None
    low: float | None
    high: float | None
    guidance_kind: str | None
    eta: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The noise levels with guidance; None for all.

        Raises:
            StageError: if only one end is given.
        """
        if self.low is None and self.high is None:
            return None
        if self.low is None or self.high is None:
            raise StageError("the guidance interval has two ends; give both, or none to guide all noise levels")
        return self.low, self.high

    def options(self) -> Options:
        """Return what the command would be given.

        Raises:
            StageError: for numbers or texts that no model takes.
        """
        if len(self.prompts or "") > MOST_CHARACTERS:
            raise StageError(f"the prompts have more than {MOST_CHARACTERS} characters; draw fewer at once")
        if self.seed is not None and self.seed > LARGEST_SEED:
            raise StageError(f"seed {self.seed} must be at most {LARGEST_SEED}")
        for name, value, most in (("count", self.count, MOST_IMAGES), ("steps", self.steps, MOST_STEPS)):
            if value is not None and not 1 <= value <= most:
                raise StageError(f"{name} {value} must lie between 1 and {most}")
        prompts = [line.strip() for line in (self.prompts or "").splitlines() if line.strip()]
        return Options(
            model=self.model,
            label=self.labels or None,
            prompt=prompts or None,
            negative_prompt=self.negative_prompt or "",
            seed=[self.seed or 0],
            count=self.count or 1,
            sampler=self.sampler,
            steps=self.steps,
            guidance=self.guidance,
            guidance_kind=self.guidance_kind,
            eta=self.eta if self.sampler == "ddim" else None,
        )


def read(kind: type[AnyModel], values: Sequence[Any]) -> AnyModel:  # what the browser sends: any JSON
    """Check the types of the values of `kind`, which are in the order of its fields.

    Raises:
        StageError: for the first value that has another type.
    """
    try:
        return kind.model_validate(dict(zip(kind.model_fields, values, strict=True)))
    except ValidationError as error:
        first = error.errors()[0]
        raise StageError(f"{first['loc'][0]} {first['input']!r} is not valid: {first['msg']}") from None
