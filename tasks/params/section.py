"""The base class of the sections of `params.yaml`, and the types that several sections use."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

PositiveInt = Annotated[int, Field(gt=0)]


def _workers(value: object) -> int | Literal["auto"]:
    """Refuse what is no number of workers in one message; a union of types would have one for each type."""
    if value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise PydanticCustomError("workers", "Input should be a number of at least 1, or 'auto'")


def _true_false_or(word: str) -> PlainValidator:
    """Refuse what is neither a boolean nor `word` in one message."""

    def valid(value: object) -> object:
        if isinstance(value, bool) or value == word:
            return value
        raise PydanticCustomError("switch", f"Input should be true, false or '{word}'")

    return PlainValidator(valid)


Compile = Annotated[bool | Literal["gpu"], _true_false_or("gpu")]
"""Whether a network is compiled: always, never, or on a GPU."""
GradientCheckpointing = Annotated[bool | Literal["auto"], _true_false_or("auto")]
Workers = Annotated[int | Literal["auto"], PlainValidator(_workers)]
"""Number of threads or processes; "auto" is one for each core that this process may use."""
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Sampler = Literal["ddpm", "ddim", "euler_ancestral", "dpm_solver_pp_2m", "euler", "heun", "consistency"]
Guidance = Literal["classifier_free", "auto"]
DrawingPrecision = Literal["no", "bf16", "fp16"]
"""Precision of the network that draws: `no` is float32, `fp16` needs a GPU. With `bf16` the autoencoder decodes in
bfloat16 as well."""
NoiseLevels = Annotated[tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]], Field(strict=False)]
"""(low, high] in sigma / alpha, the noise relative to an image in [-1, 1]."""

NO_PATH = "tasks/presets/none"
"""Value of a path parameter that names no file; DVC requires every dependency to exist."""
LOCAL = "local"
"""Value of `train.data` that names data/latents."""


class ParamsError(ValueError):
    """A parameter file that cannot be used; the message is one sentence that names the key and the remedy."""


class Section(BaseModel):
    """A frozen section; it refuses unknown keys, infinities, NaN and values of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def require_pin(where: str, weights: str | None, pin: str | None) -> None:
    """Raise `ValueError` unless `weights` and `pin` of the section `where` are both set or both null."""
    if pin is not None and weights is None:
        raise ValueError(f"{where}.pin pins {where}.weights, which is null; set both or neither")
    if weights is not None and pin is None:
        raise ValueError(
            f"{where}.weights needs {where}.pin, so that every run loads the same weights: the commit of a hub "
            "repository, or the sha256 of the weights' file in a folder or on S3"
        )


def count_of(workers: Workers) -> int:
    """Return the number of workers on this machine."""
    if workers != "auto":
        return workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
