"""`outputs/codec/codec.json`: how images and captions become model inputs, and the checksums of the networks."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from models.json_files import JsonObject
from tasks.runtime import integrity
from tasks.runtime.stage_file import Part, StageFile

FILE = "codec.json"
OPTIONAL = ("autoencoder", "text", "prompts")
"""Keys that the file omits if they have no value."""


class AutoencoderInfo(Part):
    """The autoencoder in `vae/` and the latents that it makes."""

    sha256: str
    channels: int
    """Channels of a latent."""
    size: int
    """Height and width of the latent of a square image."""
    scaling: str
    """"measured" or "published": where the scaling of the latents comes from."""
    measured_mean: list[float]
    """Mean of each channel of the unscaled latents, over training images."""
    measured_std: list[float]


class TextInfo(Part):
    """The text encoders in `text_encoder/` and `text_encoder_2/`."""

    width: int
    """Width of a token embedding."""
    length: int
    """Tokens in a caption, padding included."""
    pooled: int | None = None
    """Width of the pooled prompt embedding (SDXL conditioning); None with one encoder."""
    sha256: str = ""


class CodecInfo(StageFile):
    """The content of `codec.json`."""

    FORMAT: ClassVar[int] = 2
    STAGE: ClassVar[str] = "codec"

    kind: Literal["identity", "autoencoder"]
    conditioning: Literal["none", "label", "text"]
    size: int
    """Height and width of a square image, in pixels."""
    channels: int
    """1 for grey images, 3 for RGB."""
    classes: list[str]
    """Class names; empty without labels."""
    autoencoder: AutoencoderInfo | None = None
    text: TextInfo | None = None
    prompts: list[str] | None = None
    """Prompts of sample images: one per class, or captions of held-out images without classes."""
    files: dict[str, str]
    """Relative path -> SHA-256 of every file of the networks."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `codec.json` in `folder` and compare the networks' files with their checksums.

        Raises:
            StageError: if a file is missing, damaged or of another format.
        """
        info = cls.read(folder / FILE)
        integrity.require(folder, info.files, cls.STAGE)
        return info

    def to_json(self) -> JsonObject:
        """Return the content of the file, without optional keys that have no value."""
        values = super().to_json()
        return {name: value for name, value in values.items() if name not in OPTIONAL or value is not None}
