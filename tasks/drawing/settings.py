"""The settings of a drawing: stored in the PNG files that the command writes, and read back from them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

import PIL.PngImagePlugin
from pydantic import BaseModel, ConfigDict, ValidationError

from models.noise.samplers import Sampling
from tasks.pictures import decoding
from tasks.runtime.errors import StageError

KEY = "afterimage"
"""Keyword of the PNG text chunk (iTXt) with the settings as JSON."""
MAX_BYTES, MAX_PIXELS = 256 << 20, 1 << 28
"""Largest PNG file that settings are read from."""


Rectangle: TypeAlias = tuple[int, int, int, int]
"""Left, top, width and height of a rectangle, in pixels of the drawn image."""


class File(BaseModel):
    """An input file and its content."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    sha256: str


class Adapter(File):
    """A LoRA adapter and its weight."""

    weight: float


class Settings(BaseModel):
    """What was drawn, and how. The images are those of each label or prompt with each seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    model: str
    """A folder, or `models:/NAME/VERSION`."""
    train_key: str
    """Identity of the weights, see `PipelineInfo`."""
    labels: tuple[int | str, ...] = ()
    prompts: tuple[str, ...] = ()
    negative_prompt: str = ""
    seeds: tuple[int, ...]
    sampler: str
    steps: int
    eta: float = 0.0
    guidance: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    guidance_kind: str = "classifier_free"
    precision: Literal["no", "bf16", "fp16"] = "no"
    lora: tuple[Adapter, ...] = ()
    image: File | None = None
    strength: float | None = None
    mask: File | None = None
    mask_rectangle: Rectangle | None = None
    control: File | None = None
    control_from: File | None = None
    control_scale: float | None = None

    @property
    def sampling(self) -> Sampling:
        """Sampler, steps and guidance.

        Raises:
            ValueError: for a combination that no model supports.
        """
        return Sampling(self.sampler, self.steps, self.eta, self.guidance, self.guidance_interval, self.guidance_kind)

    def chunk(self) -> PIL.PngImagePlugin.PngInfo:
        """Return the text chunk of a PNG file: JSON without the values that are defaults."""
        chunk = PIL.PngImagePlugin.PngInfo()
        chunk.add_itxt(KEY, self.model_dump_json(exclude_defaults=True))
        return chunk


def read_settings(file: Path) -> Settings:
    """Read the settings from a PNG file that the command wrote.

    Raises:
        StageError: if the file is missing, is not such a file, or was written by another version.
    """
    if not file.is_file():
        raise StageError(f"--like {file} is no file; name a PNG that 'python -m tasks.draw' wrote")
    if file.stat().st_size > MAX_BYTES:
        raise StageError(f"--like {file} is larger than {MAX_BYTES >> 20} MiB; name a PNG that this command wrote")
    try:
        image = decoding.open_image(file.read_bytes(), MAX_PIXELS)
    except decoding.UnreadableError as error:
        raise StageError(f"--like {file} cannot be read ({error}); name a PNG that this command wrote") from None
    text = getattr(image, "text", {}).get(KEY)
    if text is None:
        raise StageError(f"--like {file} holds no settings; name a PNG that 'python -m tasks.draw' wrote")
    try:
        return Settings.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise StageError(f"--like {file} holds settings of another version ({where}: {first['msg']})") from None
