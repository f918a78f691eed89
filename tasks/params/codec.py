"""Parameters of the codec: the section `codec`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tasks.params.section import PositiveInt, Section, Seed, require_pin

PACKED_WIDTH = 80
"""Least width of a pooled embedding that is trained here; SDXL's size and crop numbers are packed beside it."""
Conditioning = Literal["none", "label", "text"]


class AutoencoderParams(Section):
    """A published autoencoder, or the architecture and training of an own one; read by codec.kind 'autoencoder'."""

    weights: str | None = None
    """A hub repository, a local folder or s3://bucket/prefix in diffusers' layout; null trains one on the images."""
    pin: str | None = None
    """Identifies `weights`: the commit of a hub repository, or the SHA-256 of the weights' file."""
    scaling: Literal["measured", "published"] = "measured"
    """`measured`: a factor per channel, measured on the images and folded into the weights; `published`: the single
    factor in the configuration of `weights`."""
    latent_channels: PositiveInt = 4
    """Channels of a latent."""
    widths: tuple[PositiveInt, ...] = Field(default=(16, 32, 48), strict=False, min_length=2)
    """Channels per resolution, highest first; each level but the last halves the side."""
    layers_per_block: PositiveInt = 1
    """Residual blocks per resolution."""
    reconstruction: Literal["l1", "l2"] = "l1"
    """Distance between an image and its reconstruction."""
    edge_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the loss on differences of neighbouring pixels, which keeps edges sharp."""
    kl_weight: Annotated[float, Field(ge=0)] = 1e-6
    """Weight of the KL divergence of the latents from the standard normal, in nats per value of the image."""
    steps: PositiveInt = 600
    """Training steps."""
    batch_size: PositiveInt = 16
    """Images per training step."""
    horizontal_flip: bool = False
    """Mirror training images with probability 0.5."""

    @model_validator(mode="after")
    def _check(self) -> AutoencoderParams:
        require_pin("codec.autoencoder", self.weights, self.pin)
        if self.scaling == "published" and self.weights is None:
            raise ValueError(
                "codec.autoencoder.scaling 'published' needs codec.autoencoder.weights; set it to 'measured' "
                "for an autoencoder that is trained here"
            )
        if any(width % 8 for width in self.widths):
            raise ValueError(f"codec.autoencoder.widths {list(self.widths)} must be multiples of 8")
        return self


class TextParams(Section):
    """Published CLIP text encoders, or own ones trained on the captions; read by codec.conditioning 'text'."""

    weights: str | None = None
    """A hub repository, a local folder or s3://bucket/prefix with text_encoder/ and tokenizer/ (and text_encoder_2/ and
    tokenizer_2/ beside them); null trains on the captions."""
    pin: str | None = None
    """Identifies `weights`: the commit of a hub repository, or the SHA-256 of the weights' file."""
    width: PositiveInt = 64
    """Width of a token embedding."""
    second_width: PositiveInt | None = None
    """Width of a second text encoder with a pooled embedding, as in Stable Diffusion XL; null is one encoder."""
    layers: PositiveInt = 2
    """Transformer layers."""
    length: Annotated[int, Field(ge=4)] = 32
    """Tokens per caption; longer captions are truncated."""
    words: Annotated[int, Field(ge=600)] = 2048
    """Largest size of the vocabulary."""
    steps: PositiveInt = 300
    """Training steps."""

    @model_validator(mode="after")
    def _check(self) -> TextParams:
        require_pin("codec.text", self.weights, self.pin)
        for name in ("width", "second_width"):
            if (getattr(self, name) or 0) % 16:
                raise ValueError(
                    f"codec.text.{name} {getattr(self, name)} must be a multiple of 16, the width of a head"
                )
        if self.second_width and self.width + self.second_width < PACKED_WIDTH:
            raise ValueError(
                f"codec.text.width {self.width} and codec.text.second_width {self.second_width} are too narrow for the "
                f"pooled embedding; their sum must be {PACKED_WIDTH} or more"
            )
        return self


class CodecParams(Section):
    """What the model is trained on, and what it is conditioned on."""

    kind: Literal["identity", "autoencoder"]
    """`identity` trains on pixels, `autoencoder` on latents."""
    conditioning: Conditioning
    """What the model is conditioned on."""
    autoencoder: AutoencoderParams = AutoencoderParams()
    text: TextParams = TextParams()
    seed: Seed = 0
    """Seed of the networks that are trained here."""
