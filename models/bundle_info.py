"""`bundle.json`: what the sampler of an ONNX bundle needs besides the graphs. The bundle has a copy of this file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .json_files import Description, JsonObject
from .noise.paths import DiffusionPath, RectifiedFlow
from .noise.samplers import SchedulerConfig

if TYPE_CHECKING:
    from models.pipeline import PipelineInfo


@dataclass(frozen=True)
class BundleText:
    """How prompts are tokenised and packed."""

    length: int
    """L: tokens per prompt, padded or truncated."""
    pads: dict[str, int]
    """Suffix of each tokenizer's file name ("" or "_2") -> id of its padding token."""
    pooled: int | None = None
    """P: width of the pooled embedding (SDXL conditioning); None without it."""
    sizes: Sequence[int] = ()
    """Original size, crop and target size, which follow the pooled embedding."""


@dataclass(frozen=True)
class BundleInfo(Description):
    """`bundle.json`: what sampling needs besides the graphs."""

    FORMAT = 4  # not annotated: run as `__main__` by runpy, a dataclass does not recognise the string "ClassVar[int]"
    REMEDY = "export the model again"

    conditioning: str
    """"none", "label" or "text"."""
    classes: list[str]
    """Names of the labels; empty for an unconditional model."""
    prompts: list[str] | None
    """The caption of each class, for a text-conditional model."""
    channels: int
    """Channels of an image, 1 or 3."""
    size: int
    """Height and width of an image, pixels."""
    latent: Sequence[int] | None
    """(channels, side) of the latents; None for a model of pixels."""
    prediction: str
    """One of `paths.PREDICTION_TYPES`."""
    null_label: int | None
    """Class index of the null condition; None unless the model is class-conditional."""
    train_key: str
    """Identity of the training run."""
    alpha_bar: list[float] | None
    """The diffusion path, [T]; None for a rectified flow."""
    flow: dict[str, float] | None
    """`timesteps` and `shift` of a rectified flow; None for a diffusion path."""
    sampling: dict[str, str | int]
    """`variance`, `spacing` and `steps_offset` of the trained scheduler."""
    text: BundleText | None = None
    """The text encoders; None for a model that is not conditioned on text."""

    @classmethod
    def from_json(cls, values: JsonObject) -> BundleInfo:
        """Build the description, with the text section if there is one."""
        text = values.get("text")
        return cls(**{**values, "text": BundleText(**text) if text else None})

    def to_json(self) -> JsonObject:
        """Return the content of the file; without a text encoder it has no text section."""
        values = super().to_json()
        return values if self.text else {key: value for key, value in values.items() if key != "text"}

    @classmethod
    def of(cls, info: PipelineInfo, scheduler: SchedulerConfig, text: BundleText | None) -> BundleInfo:
        """Describe the bundle of a trained pipeline."""
        path = scheduler.path
        return cls(
            conditioning=info.conditioning,
            classes=info.classes,
            prompts=info.prompts,
            channels=info.channels,
            size=info.size,
            latent=info.latent,
            prediction=info.prediction,
            null_label=info.null_label,
            train_key=info.train_key,
            alpha_bar=[float(level) for level in path.alpha_bar] if isinstance(path, DiffusionPath) else None,
            flow={"timesteps": path.timesteps, "shift": path.shift} if isinstance(path, RectifiedFlow) else None,
            sampling={
                "variance": scheduler.variance_type,
                "spacing": scheduler.timestep_spacing,
                "steps_offset": scheduler.steps_offset,
            },
            text=text,
        )

    @property
    def scheduler(self) -> SchedulerConfig:
        """What the trained model prescribes for sampling."""
        path = (
            RectifiedFlow(int(self.flow["timesteps"]), self.flow["shift"])
            if self.flow
            else DiffusionPath(self.alpha_bar or ())
        )
        return SchedulerConfig(
            path,
            self.prediction,
            clip_sample=self.latent is None and self.flow is None,
            variance_type=str(self.sampling["variance"]),
            timestep_spacing=str(self.sampling["spacing"]),
            steps_offset=int(self.sampling["steps_offset"]),
        )
