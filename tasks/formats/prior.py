"""`outputs/prior/`: the pictures of a subject and the class images that the base drew, for DreamBooth.

    prior.json             prompts and counts (`Prior`)
    pictures.safetensors   uint8 [n, C, S, S] each: `subject`, `class`, and `before`, which the base drew by the
                           subject's prompt
    tokens.safetensors     `ids` int64 [3, L] of the subject's prompt, the class prompt and "", for one text encoder
    class.png              the first class images
    latents/               the inputs of the training in the format of data/latents, with the splits `subject` and
                           `class`

For a training without a subject there is `prior.json` alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field
from safetensors.numpy import load_file

from tasks.runtime import integrity
from tasks.runtime.stage_file import StageFile

if TYPE_CHECKING:
    import numpy as np

FILE, PICTURES, LATENTS, GRID = "prior.json", "pictures.safetensors", "latents", "class.png"
TOKENS = "tokens.safetensors"
SUBJECT, CLASS, BEFORE = "subject", "class", "before"


class Prior(StageFile):
    """The content of `prior.json`; without a subject it is empty."""

    FORMAT: ClassVar[int] = 1
    STAGE: ClassVar[str] = "prior"

    instance_prompt: str | None = None
    """The prompt of the subject's pictures; None without a subject."""
    class_prompt: str | None = None
    token: str = ""
    contexts: list[str] = Field(default_factory=list)
    """Held-out prompts with the token."""
    images: int = 0
    """Class images."""
    measured: int = 0
    """Samples of each prompt for the measurement."""
    sampler: str = ""
    steps: int = 0
    guidance_scale: float = 1.0
    seed: int = 0
    digest: str = ""
    """That of the inputs in `latents/`."""
    files: dict[str, str] = Field(default_factory=dict)
    """Relative path -> SHA-256 of the other files, except those in `latents/`, which have an index of their own."""

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Read the description in `folder` and compare the files with their checksums; None without a subject.

        Raises:
            StageError: if a file is missing, damaged or of another format.
        """
        prior = cls.read(folder / FILE)
        integrity.require(folder, prior.files, cls.STAGE)
        return prior if prior.instance_prompt is not None else None


def pictures(folder: Path) -> dict[str, np.ndarray]:
    """Read the pictures of a folder that `Prior.load` accepted, by the names `SUBJECT`, `CLASS` and `BEFORE`."""
    return load_file(folder / PICTURES)
