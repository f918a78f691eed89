"""The whole of `params.yaml` as one type, with the checks that concern several sections."""

from __future__ import annotations

from operator import attrgetter
from typing import TypeVar

from pydantic import Field, model_validator

from tasks.params import control
from tasks.params.codec import CodecParams, Conditioning
from tasks.params.data import DownloadParams, EncodeParams, ImageParams, IngestParams, ValidateParams
from tasks.params.editing import EditParams
from tasks.params.model import Architecture, DiffusionParams, ModelParams, TrainParams
from tasks.params.prior import PriorParams
from tasks.params.results import (
    IMAGES_PER_DIMENSION,
    EvaluateParams,
    ExportParams,
    Extractor,
    JudgeParams,
    RegisterParams,
    VisualizeParams,
    images_for_distances,
)
from tasks.params.section import NO_PATH, PositiveInt, Section

S = TypeVar("S", bound=Section)

CONSISTENT = ("v_prediction", "flow_prediction")
"""Predictions whose x0 at zero noise is the input; that of `epsilon` is so as well, but badly conditioned in noise."""
DIFFUSION_SAMPLERS = ("ddpm", "ddim", "euler_ancestral", "dpm_solver_pp_2m", "consistency")
FLOW_SAMPLERS = ("euler", "heun", "dpm_solver_pp_2m", "consistency")
"""`samplers.OF_DIFFUSION` and `samplers.OF_FLOW`, without importing NumPy."""


class Demands(Section):
    """What later stages require of the data: single parameters of several sections, keyed by their dotted names."""

    conditioning: Conditioning = Field(alias="codec.conditioning")
    allow_small_n: bool = Field(alias="evaluate.allow_small_n")
    resolution: PositiveInt = Field(alias="image.resolution")
    extractor: Extractor = Field(alias="judge.extractor.kind")
    batch_size: PositiveInt = Field(alias="train.batch_size")

    @property
    def images_for_distances(self) -> int:
        """Least number of held-out images for the distances; 2 if the width of the features is not known yet."""
        return 2 if self.allow_small_n else images_for_distances(self.extractor, self.resolution)


class BaseWeights(Section):
    """The weights that a training starts from, which draw the class images of DreamBooth."""

    init_from: str = Field(alias="train.init_from")
    weights: str | None = Field(alias="train.weights")
    pin: str | None = Field(alias="train.pin")
    architecture: Architecture = Field(alias="model.architecture")


COLLECTED = (Demands, BaseWeights)
"""Types that consist of single parameters of several sections."""


class Params(Section):
    """Every section of `params.yaml`."""

    preset: str
    download: DownloadParams
    ingest: IngestParams
    validation: ValidateParams = Field(alias="validate")
    image: ImageParams
    codec: CodecParams
    encode: EncodeParams
    prior: PriorParams = PriorParams()
    model: ModelParams
    diffusion: DiffusionParams
    train: TrainParams
    judge: JudgeParams
    evaluate: EvaluateParams
    edit: EditParams
    visualize: VisualizeParams
    export: ExportParams
    register_: RegisterParams = Field(alias="register")

    def section(self, kind: type[S]) -> S:
        """Return the section of type `kind`; those of `COLLECTED` are made of several sections."""
        if issubclass(kind, COLLECTED):
            return kind.model_validate({name: attrgetter(name)(self) for name in names_of(kind)})
        return next(section for name in type(self).model_fields if isinstance(section := getattr(self, name), kind))

    @model_validator(mode="after")
    def _check(self) -> Params:
        self._check_resolution()
        self._check_flips()
        self._check_encoding()
        control.check(self)
        self._check_adapter()
        self._check_distil()
        self._check_prior()
        self._check_published()
        self._check_steps()
        self._check_guidance()
        if self.train.batch_size % self.train.gradient_accumulation:
            raise ValueError("train.gradient_accumulation must divide train.batch_size")
        self._check_source()
        self._check_distances()
        self._check_patches()
        return self

    def _check_resolution(self) -> None:
        """The autoencoder and the U-Net halve the resolution at each of their levels but the last.

        A transformer cuts it into patches.
        """
        self._check_buckets()
        side, what = self.image.resolution, "image.resolution"
        if self.codec.kind == "autoencoder":
            halvings = len(self.codec.autoencoder.widths) - 1
            if side % 2**halvings:
                raise ValueError(
                    f"image.resolution {side} cannot be halved {halvings} times; use a multiple of {2**halvings} or "
                    "fewer codec.autoencoder.widths"
                )
            what = f"the side of the latents (image.resolution {side} halved {halvings} times),"
            side //= 2**halvings
        if self.model.architecture == "dit":
            if side % self.model.dit.patch_size:
                raise ValueError(
                    f"model.dit.patch_size {self.model.dit.patch_size} does not divide {what} {side}; use a divisor"
                )
            return
        least = self.model.downsampling
        if side % least:
            raise ValueError(
                f"{what} {side} is no multiple of {least}, the factor by which model.patch_size and the levels of "
                "model.block_out_channels downsample; change one of them"
            )

    def _check_buckets(self) -> None:
        """Both sides of a bucket are halved as often as the side of the square."""
        if not self.encode.buckets:
            return
        widths = self.codec.autoencoder.widths if self.codec.kind == "autoencoder" else (0,)
        least = 2 ** (len(widths) - 1) * self.model.downsampling
        multiple, resolution = self.encode.bucket_multiple, self.image.resolution
        if multiple % least or resolution % multiple:
            raise ValueError(
                f"encode.bucket_multiple {multiple} must be a multiple of {least}, the factor by which codec and model "
                f"downsample, and divide image.resolution {resolution}; change it, or set encode.buckets to []"
            )

    def _check_flips(self) -> None:
        """Mirrored latents are encoded beforehand; mirrored pixels are made when a batch is drawn."""
        if self.codec.kind == "autoencoder" and self.train.horizontal_flip != self.encode.horizontal_flip:
            raise ValueError(
                "train.horizontal_flip draws the mirrored latents that encode.horizontal_flip makes; "
                "set both or neither"
            )
        if self.codec.kind == "identity" and self.encode.horizontal_flip:
            raise ValueError(
                "encode.horizontal_flip is for latents; pixels are mirrored as they are drawn, by train.horizontal_flip"
            )

    def _check_encoding(self) -> None:
        """Only an autoencoder and a text encoder compute in `encode.precision`; pixels and labels are copied."""
        computes = self.codec.kind == "autoencoder" or self.codec.conditioning == "text"
        if self.encode.precision != "no" and not computes:
            raise ValueError(
                f"encode.precision '{self.encode.precision}' is read by an autoencoder or a text encoder, and codec "
                "has neither; set it to 'no'"
            )

    def _check_adapter(self) -> None:
        """Options of the text-conditional network, and the base weights that a LoRA adapter needs."""
        if self.codec.conditioning != "text" and self.model.text_only:
            name = next(iter(self.model.text_only))
            raise ValueError(f"model.{name} belongs to codec.conditioning 'text'; set it to null (or false)")
        pooled = self.codec.conditioning == "text" and self.codec.text.second_width is not None
        if self.model.architecture == "dit" and pooled:
            raise ValueError(
                "codec.text.second_width adds a second text encoder, and model.architecture 'dit' takes the text of "
                "one; set codec.text.second_width to null"
            )
        has_base = self.train.init_from != NO_PATH or self.train.weights is not None or self.train.full_steps > 0
        if self.model.lora_rank and not has_base:
            raise ValueError(
                "model.lora_rank trains a LoRA adapter, which needs base weights; name them in train.weights or "
                "train.init_from, or set train.full_steps to train them first"
            )
        if self.model.lora_rank and not self.train.full_steps and self.train.optimizer == "muon":
            raise ValueError(
                "train.optimizer 'muon' is for hidden matrices, and with model.lora_rank only the adapter is trained; "
                "set train.optimizer to 'adamw'"
            )
        if self.train.full_steps and not (self.model.lora_rank or self.model.control_widths):
            raise ValueError("train.full_steps is only read with model.lora_rank or model.control_widths; set it to 0")

    def _check_distil(self) -> None:
        """Consistency tuning needs x0 = x at zero noise, all weights, and its own weighting of the loss."""
        if self.train.distil is None:
            return
        self.train.distil.check(self.train)
        if self.model.lora_rank:
            raise ValueError(
                "train.distil tunes all weights, and model.lora_rank trains an adapter; set one of them to null"
            )
        if self.diffusion.prediction not in CONSISTENT:
            raise ValueError(
                f"train.distil needs a diffusion.prediction of {' or '.join(CONSISTENT)}, whose clean image is the "
                f"input itself without noise, not '{self.diffusion.prediction}'; change it, or set train.distil to null"
            )
        if self.train.distil.after == 0 and self.diffusion.loss_weighting == "min_snr":
            raise ValueError(
                "diffusion.loss_weighting 'min_snr' weights the training before train.distil, which has none with "
                "train.distil.after 0; set diffusion.loss_weighting to 'plain'"
            )

    def _check_prior(self) -> None:
        """DreamBooth trains a text-conditional network from base weights, half of each batch on class images."""
        prior, train = self.prior, self.train
        if prior.instance_prompt is None:
            if train.text_encoder:
                raise ValueError("train.text_encoder is only read with prior.instance_prompt; set it to false")
            return
        if self.codec.conditioning != "text":
            raise ValueError("prior.instance_prompt is a prompt; set codec.conditioning to 'text', or it to null")
        if train.init_from == NO_PATH and train.weights is None:
            raise ValueError(
                "prior.instance_prompt trains DreamBooth, whose class images are drawn by base weights; name them in "
                "train.weights or train.init_from"
            )
        others = {
            "encode.buckets": self.encode.buckets,
            "encode.control": self.encode.control,
            "train.distil": train.distil,
        }
        for key, value in others.items():
            if value:
                raise ValueError(f"{key} does not work with prior.instance_prompt; reset one of them")
        if train.text_encoder and self.codec.text.second_width is not None:
            raise ValueError(
                "train.text_encoder trains a single text encoder, and codec.text.second_width adds another; set "
                "train.text_encoder to false"
            )
        if train.text_encoder and train.optimizer == "muon":
            raise ValueError("train.text_encoder is trained by AdamW; set train.optimizer to 'adamw'")
        if prior.images and train.prior_weight and train.batch_size // train.gradient_accumulation % 2:
            raise ValueError(
                "half of each batch are class images (prior.images), so train.batch_size / train.gradient_accumulation "
                "must be even; change one, or set train.prior_weight to 0"
            )

    def _check_published(self) -> None:
        """A published network needs the autoencoder and the text encoder that it was trained with."""
        if self.train.weights is None:
            return
        autoencoder = self.codec.autoencoder
        if self.codec.kind == "autoencoder" and (autoencoder.weights is None or autoencoder.scaling != "published"):
            raise ValueError(
                "train.weights names a network for the latents of its own autoencoder, with the published scaling; "
                "name that in codec.autoencoder.weights and set codec.autoencoder.scaling to 'published'"
            )
        if self.codec.conditioning == "text" and self.codec.text.weights is None:
            raise ValueError(
                "train.weights names a network for the embeddings of its own text encoder; name that in "
                "codec.text.weights"
            )

    def _check_steps(self) -> None:
        """A sampler fits the path, and takes at most one step per timestep of a noise schedule."""
        flow = self.diffusion.schedule == "rectified_flow"
        known = FLOW_SAMPLERS if flow else DIFFUSION_SAMPLERS
        for section, sampler, steps in (
            ("evaluate", self.evaluate.sampler, self.evaluate.steps),
            ("visualize", self.visualize.sampler, self.visualize.steps),
            ("edit", self.edit.sampler, self.edit.steps),
        ):
            if sampler not in known:
                raise ValueError(
                    f"{section}.sampler '{sampler}' does not sample diffusion.schedule '{self.diffusion.schedule}'; "
                    f"use one of: {', '.join(known)}"
                )
            if steps > self.diffusion.timesteps and not flow:
                raise ValueError(
                    f"{section}.steps {steps} exceeds diffusion.timesteps {self.diffusion.timesteps}; lower it"
                )

    def _check_guidance(self) -> None:
        """Classifier-free guidance needs a network with and without its condition, and autoguidance a guide."""
        if self.codec.conditioning != "none" and self.train.condition_dropout == 1:
            raise ValueError(
                "train.condition_dropout 1 never shows the network its condition; lower it, or set codec.conditioning "
                "to 'none'"
            )
        evaluate, visualize = self.evaluate, self.visualize
        if visualize.prompts and self.codec.conditioning != "text":
            raise ValueError(
                f"visualize.prompts needs a model that takes prompts, but codec.conditioning is "
                f"'{self.codec.conditioning}'; set it to [], or codec.conditioning to 'text'"
            )
        for name, kind in (("evaluate", evaluate.guidance), ("visualize", visualize.guidance)):
            if kind == "auto" and not self.train.guide_step:
                raise ValueError(
                    f"{name}.guidance 'auto' compares with the weights of train.guide_step, which is 0 and saves none; "
                    f"set it to an early step, or {name}.guidance to 'classifier_free'"
                )
        if evaluate.guidance == "classifier_free":
            self._check_classifier_free("evaluate.guidance_scale", (evaluate.guidance_scale,))
        if visualize.guidance == "classifier_free":
            self._check_classifier_free("visualize.guidance_scales", visualize.guidance_scales)
        if self.edit.n_images:
            self._check_classifier_free("edit.guidance_scale", (self.edit.guidance_scale,))
        if self.codec.conditioning != "none" or not self.train.guide_step:  # else the sweep is one of autoguidance
            self._check_classifier_free("evaluate.guidance_sweep", evaluate.guidance_sweep)

    def _check_classifier_free(self, key: str, scales: tuple[float, ...]) -> None:
        if all(scale == 1 for scale in scales):
            return
        if self.codec.conditioning == "none":
            raise ValueError(
                "classifier-free guidance needs a condition, but codec.conditioning is 'none'; set edit.guidance_scale "
                "and evaluate.guidance_scale to 1.0, evaluate.guidance_sweep to [] and visualize.guidance_scales to "
                "[1.0], or save a guide (train.guide_step) and set evaluate.guidance and visualize.guidance to 'auto'"
            )
        if self.train.condition_dropout == 0:
            raise ValueError(
                f"{key} other than 1 needs a model that is trained without its condition at times; "
                "set train.condition_dropout above 0"
            )

    def _check_source(self) -> None:
        """Sources that are known to lack labels or captions."""
        source, conditioning = self.download.source, self.codec.conditioning
        if source in ("digits", "cifar10") and conditioning == "text" and not self.ingest.caption_templates:
            raise ValueError(
                f"download.source '{source}' has no captions for codec.conditioning 'text'; set "
                "ingest.caption_templates, such as ['a photo of a {}']"
            )
        if source == "laion" and conditioning == "label":
            raise ValueError("download.source 'laion' has captions and no labels; set codec.conditioning to 'text'")

    def _check_distances(self) -> None:
        needed = images_for_distances(self.judge.extractor.kind, self.image.resolution)
        if self.evaluate.n_distance < needed and not self.evaluate.allow_small_n:
            raise ValueError(
                f"evaluate.n_distance {self.evaluate.n_distance} is too small for features of "
                f"{needed // IMAGES_PER_DIMENSION} dimensions (judge.extractor.kind '{self.judge.extractor.kind}'); "
                f"raise it to {needed} or more, or set evaluate.allow_small_n to true"
            )

    def _check_patches(self) -> None:
        if self.codec.conditioning == "text" and self.model.architecture == "unet" and self.model.patch_size > 1:
            raise ValueError(
                f"model.patch_size {self.model.patch_size} is not for codec.conditioning 'text', whose U-Net is "
                "that of Stable Diffusion; set it to 1"
            )


def names_of(kind: type[Section]) -> list[str]:
    """Keys of `params.yaml` that a section of type `kind` is read from: one, or for `COLLECTED` one per value."""
    if issubclass(kind, COLLECTED):
        return [str(field.alias) for field in kind.model_fields.values()]
    return [field.alias or name for name, field in Params.model_fields.items() if field.annotation is kind]
