"""Parameters of the results: the sections `judge`, `evaluate`, `visualize`, `export` and `register`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from models.judges.feature_widths import INCEPTION, stage_widths
from tasks.params.section import (
    Compile,
    DrawingPrecision,
    Fraction,
    Guidance,
    NoiseLevels,
    PositiveInt,
    Sampler,
    Section,
    Seed,
    require_pin,
)

if TYPE_CHECKING:
    from models.noise.samplers import Sampling

MODEL_NAME = re.compile(r"\w([\w -]{0,198}\w)?")
"""Stricter than MLflow's rule for registered models: the name also occurs in filters and URIs."""
IMAGES_PER_DIMENSION = 2
"""Least number of images per feature dimension; the estimate of the covariance is poor below it."""
Extractor = Literal["in_domain", "inception", "clip", "dinov2"]
Headline = Literal["frechet_distance", "kid", "cmmd"]
"""A distance between samples and held-out images."""


class ExtractorParams(Section):
    """The network whose features the distances compare."""

    kind: Extractor = "in_domain"
    """`in_domain` is trained on the data; the others are published. `inception` is the network of FID."""
    weights: str | None = None
    """A hub repository, a local folder or s3://bucket/prefix with safetensors; for `inception` also the file
    pt_inception-2015-12-05-6726825d.pth, its http(s) address, or env:NAME of a variable that contains the address."""
    pin: str | None = None
    """Identifies `weights`: a commit of the hub, or the SHA-256 of the file."""

    @model_validator(mode="after")
    def _check(self) -> ExtractorParams:
        if self.kind == "in_domain" and self.weights is not None:
            raise ValueError("judge.extractor.weights is not read by kind 'in_domain'; set it to null")
        if self.kind != "in_domain" and self.weights is None:
            source = {
                "inception": "the file pt_inception-2015-12-05-6726825d.pth of github.com/mseitzer/pytorch-fid",
                "clip": "such as the hub's openai/clip-vit-base-patch32",
                "dinov2": "such as the hub's facebook/dinov2-small",
            }[self.kind]
            raise ValueError(f"judge.extractor.kind '{self.kind}' needs judge.extractor.weights, {source}")
        require_pin("judge.extractor", self.weights, self.pin)
        return self


class ScoringClipParams(Section):
    """The CLIP model of the CLIP score."""

    weights: str | None = None
    """A hub repository, a local folder or s3://bucket/prefix with a published CLIP; null trains one on the captions."""
    pin: str | None = None
    """Identifies `weights`: a commit of the hub, or the SHA-256 of the file."""

    @model_validator(mode="after")
    def _check(self) -> ScoringClipParams:
        require_pin("judge.clip", self.weights, self.pin)
        return self


class JudgeParams(Section):
    """The networks that measure samples."""

    extractor: ExtractorParams = ExtractorParams()
    clip: ScoringClipParams = ScoringClipParams()
    classifier_steps: PositiveInt
    """Steps of the classifier, or of the self-supervised encoder if the data has neither labels nor captions."""
    clip_steps: PositiveInt
    """Steps of the CLIP that scores samples against captions."""
    batch_size: PositiveInt = 64
    """Images per training step."""
    horizontal_flip: bool = False
    """Mirror training images with probability 0.5; not for digits or text."""
    seed: Seed = 1
    """Seed of the networks that measure."""


def _check_sampling(name: str, section: EvaluateParams | VisualizeParams, scales: tuple[float, ...]) -> None:
    """Check `eta`, `guidance` and `guidance_interval` of the section `name`."""
    if section.eta and section.sampler != "ddim":
        raise ValueError(f"{name}.eta is only read by {name}.sampler 'ddim'; set it back to 0.0")
    if section.guidance == "auto" and set(scales) == {1.0}:
        raise ValueError(
            f"{name}.guidance 'auto' needs a scale, and scale 1 is no guidance; set it to 'classifier_free', or raise "
            "the scale"
        )
    if section.guidance_interval is None:
        return
    low, high = section.guidance_interval
    if low >= high:
        raise ValueError(f"{name}.guidance_interval [{low:g}, {high:g}] is empty; give the lower noise level first")
    if set(scales) == {1.0}:
        raise ValueError(
            f"{name}.guidance_interval limits guidance, but scale 1 is no guidance; set it to null, or raise the scale"
        )


class EvaluateParams(Section):
    """The protocol of the measurement."""

    sampler: Sampler
    """Sampler of the measured images."""
    steps: PositiveInt
    """Sampling steps."""
    eta: Fraction = 0.0
    """Stochasticity of 'ddim': 0 is deterministic, 1 has the variance of 'ddpm' (DDIM paper, eq. 16)."""
    n_distance: Annotated[int, Field(ge=2)]
    """Unguided samples per seed block, for the distances."""
    n_accuracy: PositiveInt
    """Samples per seed block at `guidance_scale`, for label accuracy and CLIP score."""
    n_compare: PositiveInt
    """Samples of each other sampler in the table of samplers."""
    n_slowest: PositiveInt
    """Samples of the slowest sampler, for the grid: DDPM with every timestep, or on a rectified flow Heun."""
    guidance: Guidance = "classifier_free"
    """Kind of guidance: against the network without its condition, or with 'auto' against its guide, the weights of
    `train.guide_step` (Karras et al. 2024b)."""
    guidance_scale: Annotated[float, Field(ge=1)]
    """w of the guided samples; 1 is no guidance."""
    guidance_interval: NoiseLevels | None = None
    """Noise levels at which guidance is applied (Kynkäänniemi et al. 2024); null is all."""
    guidance_sweep: tuple[Annotated[float, Field(ge=1)], ...] = Field(default=(), strict=False)
    """Guidance scales of the curve of distance against CLIP score, with every kind of guidance that the model has;
    empty for a model without guidance."""
    n_sweep: Annotated[int, Field(ge=2)] = 128
    """Samples at each scale of `guidance_sweep`."""
    seed_blocks: Annotated[int, Field(ge=3)] = 3
    """Sets of samples with different seeds; a measure is their mean, and its spread their standard deviation."""
    headline: Headline = "frechet_distance"
    """The distance that leads reports, `reports/metrics.json` and `tasks.goals`, and that the gates of `register`
    compare. All are measured, and their values do not depend on it."""
    allow_small_n: bool = False
    """Measure distances over fewer than two images per feature dimension; the reports note it beside each number."""
    batch_size: PositiveInt = 256
    """Images that are drawn at a time."""
    precision: DrawingPrecision = "no"
    """Precision of the network that draws. Not part of the fingerprint; how far a lower precision is from float32 is
    measured over a few images."""
    compile: Compile = False
    """Compile the network that draws, as `train.compile` does. Not part of the fingerprint either; how far its images
    are from those of the uncompiled network is measured likewise."""
    seed: Seed = 1000
    """First seed of the samples."""

    @model_validator(mode="after")
    def _check(self) -> EvaluateParams:
        _check_sampling("evaluate", self, (self.guidance_scale,))
        return self

    @property
    def sampling(self) -> Sampling:
        """The settings of guided samples; unguided ones differ in the guidance."""
        from models.noise.samplers import Sampling  # imports NumPy, which loading parameters does not need

        scale, interval = self.guidance_scale, self.guidance_interval
        return Sampling(self.sampler, self.steps, self.eta, scale, interval, self.guidance)


class VisualizeParams(Section):
    """The figures of the report."""

    sampler: Sampler
    """Sampler of the figures."""
    steps: PositiveInt
    """Sampling steps."""
    eta: Fraction = 0.0
    """Stochasticity of 'ddim', see `EvaluateParams.eta`."""
    guidance: Guidance = "classifier_free"
    """Kind of guidance, see `EvaluateParams.guidance`."""
    guidance_scales: tuple[Annotated[float, Field(ge=1)], ...] = Field(strict=False, min_length=1)
    """A row of samples for each guidance scale."""
    guidance_interval: NoiseLevels | None = None
    """Noise levels at which guidance is applied; null is all."""
    columns: PositiveInt = 10
    """Samples in a row."""
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), strict=False)
    """Prompts of the pictures by guidance scale, seed and number of steps; empty takes four of the data's. Only for
    models that take prompts."""
    precision: DrawingPrecision = "no"
    """Precision of the network that draws."""
    seed: Seed = 7
    """First seed of the samples."""

    @model_validator(mode="after")
    def _check(self) -> VisualizeParams:
        _check_sampling("visualize", self, self.guidance_scales)
        return self

    def sampling(self, guidance_scale: float) -> Sampling:
        """Return the settings of one row of samples."""
        from models.noise.samplers import Sampling  # imports NumPy, which loading parameters does not need

        return Sampling(self.sampler, self.steps, self.eta, guidance_scale, self.guidance_interval, self.guidance)


class ExportParams(Section):
    """The ONNX bundle and its comparison with PyTorch."""

    opset: Annotated[int, Field(ge=18, le=26)] = 20
    """ONNX Runtime does not load opsets after 26. 20 is the fastest on a CPU, see `docs/evaluation.md`."""
    precision: Literal["fp32", "fp16"] = "fp32"
    """Precision of the network in the ONNX bundle, whose inputs and output stay in float32. `fp16` halves its file, and
    is faster on a GPU; autoencoder and text encoders stay in float32."""
    max_abs_difference: Annotated[float, Field(gt=0)] = 1e-4
    """Largest difference between the outputs of the ONNX and the PyTorch network, both in full float32; where an output
    is larger than 1, as a share of the largest. Not a limit for `precision` fp16, which `min_psnr` limits."""
    min_psnr: PositiveInt = 50
    """Least PSNR in dB between images of the ONNX and the PyTorch sampler from the same noise."""
    latency_batches: tuple[PositiveInt, ...] = Field(default=(1, 8, 32), strict=False)
    """Batch sizes whose latency is measured."""
    seed: Seed = 3
    """Seed of the compared inputs."""


class RegisterParams(Section):
    """The registered model and its gates."""

    model_name: str
    """Name of the registered model in MLflow."""
    max_distance_over_floor: Annotated[float, Field(gt=0)]
    """Gate of the first version: largest `evaluate.headline`, as a multiple of its floor."""
    min_label_accuracy: Fraction
    """Gate of every version; ignored if label accuracy does not apply."""
    min_control_margin: Fraction = 0.1
    """Gate of models with a ControlNet: least agreement with control maps above that with another map or without one.
    """
    min_clip_over_real: Fraction = 0.7
    """Gate of every version with prompts: least CLIP score, as a share of that of real images with their captions."""
    max_near_copies: Fraction = 0.2
    """Gate of every version: largest share of samples that are near copies of training images. 1 disables it."""
    min_onnx_psnr: Annotated[float, Field(gt=0)] = 50.0
    """Gate of every version: least PSNR in dB between images of the ONNX bundle and of PyTorch."""

    @model_validator(mode="after")
    def _check(self) -> RegisterParams:
        if not MODEL_NAME.fullmatch(self.model_name):
            raise ValueError(
                f"register.model_name {self.model_name!r} cannot name a model in MLflow; use at most 200 "
                "letters, digits, '-', '_' and inner spaces"
            )
        return self


def images_for_distances(extractor: Extractor, resolution: int) -> int:
    """Least number of images on each side for distances in the features of `extractor`.

    The width of `clip` and `dinov2` depends on the published network; 2 is returned for them.
    """
    dimensions = {"in_domain": stage_widths(resolution)[-1], "inception": INCEPTION}.get(extractor, 1)
    return IMAGES_PER_DIMENSION * dimensions
