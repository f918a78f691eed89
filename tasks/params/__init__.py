"""Every parameter of the chain, typed, in one import-light file.

`params.yaml` has one section per stage and a few that several stages share (`image`, `model`,
`diffusion`). `load()` validates the whole file at once, so a mistake in the last stage's section
shows before the first stage works. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.judges.feature_widths import INCEPTION, stage_widths
from tasks.runtime.redaction import redacted, secret_in_address

if TYPE_CHECKING:
    from models.samplers import Sampling

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Sampler = Literal["ddpm", "ddim", "euler_ancestral", "dpm_solver_pp_2m"]
NoiseLevels = Annotated[tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]], Field(strict=False)]
"""(low, high] in sigma = sqrt((1 - alpha_bar) / alpha_bar), the size of the noise beside an image in [-1, 1]."""

# DVC wants every dependency to exist. A source that is not a local file names the lock file, which
# pins the package that brings the digits and the client that fetches the rest.
NO_LOCAL_SOURCE = "requirements.lock"
NO_WARM_START = "requirements.lock"
"""The same for `train.init_from`: what is there in any case, and says which torch trains."""

FROM_ENVIRONMENT = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*")
"""An address that must not be written down: the name of the environment variable that holds it."""
MODEL_NAME = re.compile(r"\w([\w -]{0,198}\w)?")
"""Narrower than MLflow's rule for registered models: it must also do as a logged model's name, in filters and URIs."""
AVERAGES = {"decay": 1.0, "std": 0.288, "gamma": 1e4}
"""Kinds of averages of the weights that `train.ema` may name, and what their number must stay below."""
_NUMBER = re.compile(r"\d+(\.\d+)?")
PACKED_WIDTH = 80
"""What a pooled embedding trained here and the numbers of size and crop need beside each other."""


IMAGES_PER_DIMENSION = 2
"""A covariance of fewer images per feature dimension says little."""
Extractor = Literal["in_domain", "inception", "clip", "dinov2"]


class ParamsError(ValueError):
    """A parameter file that cannot be used; the message is one sentence naming key and remedy."""


class Section(BaseModel):
    """A frozen section that refuses unknown keys, infinities and NaN, and does not convert types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class HubParams(Section):
    """A data set on the Hugging Face hub."""

    repo: str | None = None
    """Such as 'uoft-cs/cifar10'."""
    revision: str | None = None
    """A commit; anything else is looked up and answered with the commit to pin."""
    files: str = "*.parquet"
    """Pattern of the paths that are wanted; `*` stands for any characters, '/' included."""


class S3Params(Section):
    """Access to `s3://` addresses; credentials come from the environment or the profile alone."""

    endpoint_url: str | None = None
    """Of a server that is compatible with S3; null takes AWS_ENDPOINT_URL, or Amazon's."""
    anonymous: bool = False
    """Ask without credentials, as public buckets allow."""
    connections: PositiveInt = 8


class ColumnsParams(Section):
    """Columns of the hub's tables; what is null or empty is found by the kind and the usual names of columns."""

    image: str | None = None
    label: str | None = None
    """Such as 'label', or 'attributes[20]' for an element of lists."""
    captions: tuple[str, ...] = Field(default=(), strict=False)
    classes: tuple[str, ...] = Field(default=(), strict=False)
    """Names of the labels, in their order, where the tables do not name them."""


class LaionParams(Section):
    """Which rows of a table of addresses are wanted, and how they are downloaded. A filter that is null is off."""

    max_images: PositiveInt = 10_000
    """The first rows that pass the filters, at most so many."""
    min_side: PositiveInt | None = 256
    max_aspect_ratio: Annotated[float, Field(ge=1)] | None = 2.0
    min_similarity: float | None = 0.28
    """Between picture and text, as published (CLIP)."""
    max_watermark: Fraction | None = 0.5
    max_unsafe: Fraction | None = 0.1
    """A row whose `punsafe` is not known counts as unsafe."""
    languages: tuple[str, ...] = Field(default=(), strict=False)
    """Such as ['en', 'de']; empty takes all, and the English release has no such column."""
    shorter_side: PositiveInt | None = None
    """Larger pictures are brought down to it and saved as JPEG; null keeps the bytes as published."""
    min_success_rate: Fraction = 0.5
    """Share of the addresses that must give an image; 30 to 40 per cent are dead."""
    processes: PositiveInt = 2
    threads: PositiveInt = 16
    """In each process: as many downloads at the same time."""
    shard_size: PositiveInt = 1000
    """Addresses in a shard; a shard that is complete is not downloaded again."""
    seconds_per_wait: PositiveInt = 10
    seconds_per_image: PositiveInt = 30
    retries: Annotated[int, Field(ge=0)] = 1
    max_image_bytes: PositiveInt = 20_000_000
    max_pixels: PositiveInt = 50_000_000
    user_agent: str | None = None
    """A name by which sites may know and forbid this download."""
    distributor: Literal["multiprocessing", "pyspark", "ray"] = "multiprocessing"
    subjob_size: PositiveInt = 1000
    """Shards of one job of `pyspark`."""
    proxy_host: str = "127.0.0.1"
    """Address of this machine at which the workers reach its filtering proxy."""


class DownloadParams(Section):
    source: Literal["digits", "cifar10", "folder", "hub", "laion"]
    path: str = NO_LOCAL_SOURCE
    """Local folder, zip or tar of source `folder`; a DVC dependency, so an edit is seen."""
    url: str | None = None
    """http(s) or s3:// address of source `folder` (an s3:// prefix ends in '/'), or a mirror for `cifar10`.
    `env:NAME` takes an http(s) address, such as a signed one, from the environment variable NAME at run time; user and
    password of a host come from ~/.netrc."""
    sha256: str | None = None
    """Expected sha256 of the file behind `url`, or of the listing of an s3:// prefix, which the stage says."""
    allow_private_addresses: bool = False
    max_bytes: PositiveInt = 20_000_000_000
    timeout_seconds: PositiveInt = 3600
    licence: str = "unknown"
    images: PositiveInt | None = None
    """Number of images that the source must hold; null takes any."""
    s3: S3Params = S3Params()
    hub: HubParams = HubParams()
    columns: ColumnsParams = ColumnsParams()
    laion: LaionParams = LaionParams()

    @model_validator(mode="after")
    def _check(self) -> DownloadParams:
        local, remote, named = self.path != NO_LOCAL_SOURCE, self.url is not None, self.hub.repo is not None
        if self.source == "folder" and local == remote:
            raise ValueError(
                "download.source is 'folder', so set either download.path (a local folder, zip or tar) "
                "or download.url, and not both"
            )
        if self.source == "hub" and not named:
            raise ValueError("download.source is 'hub', so set download.hub.repo, such as 'uoft-cs/cifar10'")
        if self.source == "laion" and local == named:
            raise ValueError(
                "download.source is 'laion', so set either download.path (local Parquet tables of addresses) "
                "or download.hub.repo, and not both"
            )
        if self.source not in ("folder", "laion") and local:
            raise ValueError(
                "download.path is only read by download.source 'folder' and 'laion'; "
                f"set it back to '{NO_LOCAL_SOURCE}'"
            )
        if self.source in ("digits", "hub", "laion") and remote:
            raise ValueError(f"download.url is not read by download.source '{self.source}'; remove it")
        if self.source == "folder" and remote and self.sha256 is None and not self._is_prefix():
            raise ValueError("download.url needs download.sha256, so that the same bytes come every time")
        if self.sha256 is not None and not (self.source == "folder" and remote):
            raise ValueError("download.sha256 is only read with source 'folder' and download.url; set it to null")
        kinds = ("http://", "https://", "s3://") if self.source == "folder" else ("http://", "https://")
        if self.url is not None and not self.url.startswith(kinds) and not FROM_ENVIRONMENT.fullmatch(self.url):
            raise ValueError(
                f"download.url must begin with {' or '.join(kinds)}, or be env:NAME of an environment variable"
            )
        return self

    def _is_prefix(self) -> bool:
        return self.url is not None and self.url.startswith("s3://") and self.url.endswith("/")

    @model_validator(mode="after")
    def _check_parts(self) -> DownloadParams:
        """A part that another source reads must be as it was: a value that nobody reads is a mistake."""
        if not (self.url or "").startswith("s3://") and self.s3 != S3Params():
            raise ValueError("download.s3 is only read with an s3:// address in download.url; reset it")
        if self.source not in ("hub", "laion") and self.hub != HubParams():
            raise ValueError("download.hub is only read by download.source 'hub' and 'laion'; reset it")
        if self.source != "hub" and (self.columns != ColumnsParams() or self.images is not None):
            raise ValueError("download.columns and download.images are only read by download.source 'hub'; reset them")
        if self.source != "laion" and self.laion != LaionParams():
            raise ValueError("download.laion is only read by download.source 'laion'; reset it")
        return self


class IngestParams(Section):
    shards: Literal[1, 16, 256]
    """Number of Parquet shards; a shard is a prefix of the key's hash."""
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)]
    """Share of the images that the key hash sends to `test` where the source publishes no split."""
    caption_templates: tuple[str, ...] = Field(default=(), strict=False)
    """Captions made from the class name, such as 'a photo of a {}', where the source has none."""
    max_pixels: PositiveInt = 50_000_000
    max_image_bytes: PositiveInt = 50_000_000
    workers: PositiveInt = 2

    @model_validator(mode="after")
    def _check(self) -> IngestParams:
        for template in self.caption_templates:
            if template.count("{}") != 1:
                raise ValueError(f"ingest.caption_templates needs exactly one '{{}}' in each, not {template!r}")
        return self


Check = Literal[
    "schema", "rows", "keys", "size", "aspect", "mode", "splits", "hashes", "licence", "origin", "safety",
    "decodability", "duplicates", "leaks", "near_duplicates", "near_leaks", "labels", "unlabelled",
    "class_size", "drift", "captions", "captions_read", "caption_length", "caption_characters", "caption_script",
]  # fmt: skip
Script = Literal[
    "LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "GEORGIAN", "HEBREW", "ARABIC", "DEVANAGARI", "BENGALI", "TAMIL", "THAI",
    "HANGUL", "HIRAGANA", "KATAKANA", "CJK",
]  # fmt: skip


class ValidateParams(Section):
    min_images: PositiveInt
    min_side: PositiveInt | None = None
    """Least shorter side of a picture; null is `image.resolution`. Smaller pictures that it allows are enlarged."""
    max_aspect_ratio: Annotated[float, Field(ge=1)]
    max_quarantined_fraction: Fraction
    min_images_per_class: Annotated[int, Field(ge=0)]
    max_caption_characters: PositiveInt = 2000
    caption_scripts: tuple[Script, ...] = Field(default=("LATIN",), strict=False)
    """Scripts in which captions are expected, named as Unicode names their letters."""
    max_duplicate_fraction: Fraction = 0.05
    near_duplicate_bits: Annotated[int, Field(ge=0, le=6)] = 3
    """Pictures whose perceptual hashes of 64 bits differ in at most so many are near duplicates."""
    max_label_drift: Fraction = 0.1
    """Share of the images that may lie in other classes than in the accepted version in `baseline`."""
    baseline: str = "tasks/presets/accepted_digits.json"
    """A copy of the data/accepted.json of an earlier version, kept in Git: what `drift` compares with."""
    warn_only: tuple[Check, ...] = Field(
        default=("near_duplicates", "near_leaks", "unlabelled", "drift", "captions_read", "caption_script"),
        strict=False,
    )
    """Checks that are reported and stop nothing; every other one stops the chain."""


class ImageParams(Section):
    """The form in which images meet a model: square uint8 [channels, resolution, resolution]."""

    resolution: PositiveInt
    channels: Literal[1, 3]


class AutoencoderParams(Section):
    """Read by codec.kind 'autoencoder' alone: a published network, or the shape and training of one made here."""

    weights: str | None = None
    """A hub repository, a local folder or s3://bucket/prefix in diffusers' layout; null trains one here."""
    pin: str | None = None
    """What keeps `weights` the same: the commit of a hub repository, or the sha256 of the weights' file."""
    scaling: Literal["measured", "published"] = "measured"
    """Per channel on these images and folded into the weights, or the one factor that came with `weights`."""
    latent_channels: PositiveInt = 4
    widths: tuple[PositiveInt, ...] = Field(default=(16, 32, 48), strict=False, min_length=2)
    """One per resolution, highest first; each but the last halves the side."""
    layers_per_block: PositiveInt = 1
    reconstruction: Literal["l1", "l2"] = "l1"
    edge_weight: Annotated[float, Field(ge=0)] = 0.5
    kl_weight: Annotated[float, Field(ge=0)] = 1e-6
    steps: PositiveInt = 600
    batch_size: PositiveInt = 16
    horizontal_flip: bool = False

    @model_validator(mode="after")
    def _check(self) -> AutoencoderParams:
        _require_pin("codec.autoencoder", self.weights, self.pin)
        if self.scaling == "published" and self.weights is None:
            raise ValueError(
                "codec.autoencoder.scaling 'published' needs codec.autoencoder.weights; an autoencoder that is "
                "trained here has its scaling 'measured'"
            )
        if any(width % 8 for width in self.widths):
            raise ValueError(f"codec.autoencoder.widths {list(self.widths)} must be multiples of 8")
        return self


class TextParams(Section):
    """Read by codec.conditioning 'text' alone: published CLIP text encoders, or such trained here on the captions."""

    weights: str | None = None
    """A hub repository, a local folder or s3://bucket/prefix with text_encoder/ and tokenizer/ (and text_encoder_2/ and
    tokenizer_2/ beside them); null trains here."""
    pin: str | None = None
    width: PositiveInt = 64
    second_width: PositiveInt | None = None
    """Of a second encoder, with a pooled embedding: the network is a Stable Diffusion XL then; null is one encoder."""
    layers: PositiveInt = 2
    length: Annotated[int, Field(ge=4)] = 32
    """Tokens of a caption; longer ones are cut."""
    words: Annotated[int, Field(ge=600)] = 2048
    """Most entries of the vocabulary."""
    steps: PositiveInt = 300

    @model_validator(mode="after")
    def _check(self) -> TextParams:
        _require_pin("codec.text", self.weights, self.pin)
        for name in ("width", "second_width"):
            if (getattr(self, name) or 0) % 16:
                raise ValueError(
                    f"codec.text.{name} {getattr(self, name)} must be a multiple of 16, the width of a head"
                )
        if self.second_width and self.width + self.second_width < PACKED_WIDTH:
            raise ValueError(
                f"codec.text.width {self.width} and codec.text.second_width {self.second_width} leave no room for the "
                f"pooled embedding; let them be {PACKED_WIDTH} or more together"
            )
        return self


def _require_pin(where: str, weights: str | None, pin: str | None) -> None:
    if pin is not None and weights is None:
        raise ValueError(f"{where}.pin pins {where}.weights, which is null; set both or neither")
    if weights is not None and pin is None:
        raise ValueError(
            f"{where}.weights needs {where}.pin, so that the same weights come every time: the commit of a hub "
            "repository, or the sha256 of the weights' file in a folder or on S3"
        )


Conditioning = Literal["none", "label", "text"]


class CodecParams(Section):
    kind: Literal["identity", "autoencoder"]
    """What the model sees of an image: its pixels, or latents."""
    conditioning: Conditioning
    autoencoder: AutoencoderParams = AutoencoderParams()
    text: TextParams = TextParams()
    seed: Seed = 0


class EncodeParams(Section):
    shard_size: PositiveInt = 16384
    """Images in one safetensors shard."""
    horizontal_flip: bool = False
    """Encode each image a second time, mirrored; `train.horizontal_flip` draws one of the two. Latents only: pixels
    are mirrored as they are drawn."""
    buckets: tuple[Annotated[float, Field(ge=0.25, le=4)], ...] = Field(default=(), strict=False)
    """Shapes (width / height) besides the square to which pictures may be brought, each to the nearest, all with the
    area of `image.resolution` squared; none crops every picture to the square."""
    bucket_multiple: PositiveInt = 64
    """What divides the sides of buckets."""
    workers: PositiveInt = 2
    """Threads that decode and, on a CPU, encode. They decide no byte."""


class ModelParams(Section):
    """The U-Net; names and meanings are those of diffusers' `UNet2DModel`, and for text those of its
    `UNet2DConditionModel`."""

    block_out_channels: tuple[PositiveInt, ...] = Field(strict=False, min_length=1)
    attention: tuple[bool, ...] = Field(strict=False)
    """One flag per resolution, highest first: self-attention there or not, for text also attention to it."""
    layers_per_block: PositiveInt
    norm_num_groups: PositiveInt
    attention_head_dim: PositiveInt | None
    """Channels per head; null is one head over all channels."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    heads: PositiveInt | None = None
    """Text only: heads at every resolution, in place of `attention_head_dim`."""
    transformer_layers: tuple[PositiveInt, ...] | None = Field(default=None, strict=False)
    """Text only: transformer blocks at each resolution; null is one."""
    linear_projection: bool = False
    """Text only: Stable Diffusion 2's and XL's way into a transformer."""
    lora_rank: PositiveInt | None = None
    """Text only: train low-rank additions of this rank to what `train.weights` or `train.init_from` gives; null trains
    all weights."""

    @property
    def text_only(self) -> dict[str, Any]:
        """What only the text-conditional network has, where it is set."""
        names = ("heads", "transformer_layers", "linear_projection", "lora_rank")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    @model_validator(mode="after")
    def _check(self) -> ModelParams:
        if self.heads is not None and self.attention_head_dim is not None:
            raise ValueError("model.heads stands in place of model.attention_head_dim; set one of them to null")
        if self.transformer_layers is not None and len(self.transformer_layers) != len(self.block_out_channels):
            raise ValueError("model.transformer_layers needs one number per entry of model.block_out_channels")
        if len(self.attention) != len(self.block_out_channels):
            raise ValueError(
                f"model.attention has {len(self.attention)} flags for {len(self.block_out_channels)} resolutions; "
                "give one per entry of model.block_out_channels"
            )
        if self.block_out_channels[0] % 2:
            raise ValueError(
                f"the first of model.block_out_channels is {self.block_out_channels[0]}, but half of the time "
                "embedding is sines and half cosines; make it even"
            )
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(f"model.norm_num_groups {self.norm_num_groups} does not divide the width {width}")
            if self.attention_head_dim and width % self.attention_head_dim:
                raise ValueError(f"model.attention_head_dim {self.attention_head_dim} does not divide {width}")
            if self.heads and width % self.heads:
                raise ValueError(f"model.heads {self.heads} does not divide the width {width}")
        return self


class DiffusionParams(Section):
    schedule: Literal["linear", "cosine", "sigmoid", "scaled_linear"]
    """Of the noise; "scaled_linear" is Stable Diffusion's."""
    timesteps: Annotated[int, Field(ge=2)]
    prediction: Literal["epsilon", "sample", "v_prediction"]
    """What the network outputs: the noise, the clean image, or v; diffusers' names."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last timestep is pure noise (Lin et al. 2024)."""
    loss_weighting: Literal["plain", "min_snr"] = "plain"
    min_snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    """Read by loss_weighting 'min_snr' alone; 5 is the paper's (Hang et al. 2023)."""

    @model_validator(mode="after")
    def _check(self) -> DiffusionParams:
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "diffusion.zero_terminal_snr makes the last timestep pure noise, which says nothing of the image; "
                "set diffusion.prediction to 'v_prediction' or 'sample', or diffusion.zero_terminal_snr to false"
            )
        if self.zero_terminal_snr and self.loss_weighting == "min_snr":
            raise ValueError(
                f"diffusion.loss_weighting 'min_snr' forbids {self.prediction!r} with diffusion.zero_terminal_snr: the "
                "last timestep, where sampling begins, would weigh nothing; set diffusion.loss_weighting to 'plain'"
            )
        return self


class TrainParams(Section):
    steps: PositiveInt
    batch_size: PositiveInt
    """Images of one step of the optimizer, over all processes and accumulated parts."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)]
    lr_schedule: Literal["constant", "cosine"]
    """After the warm-up: constant (then more steps only continue a run) or a half cosine down to 0."""
    warmup_steps: Annotated[int, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    ema: tuple[str, ...] = Field(strict=False, min_length=1)
    """Averages of the weights that the run keeps: decay-0.999, or a power law as std-0.10 or gamma-6.94."""
    pipeline_ema: str
    """Which of them goes into the pipeline; another choice later trains no step."""
    condition_dropout: Fraction
    """Probability of training a sample without its condition (classifier-free guidance)."""
    horizontal_flip: bool = False
    precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_accumulation: PositiveInt = 1
    gradient_checkpointing: bool = False
    """Compute the activations of each block again in the backward pass: less memory, a third more time."""
    channels_last: bool = False
    """Memory format of the convolutions; faster on GPUs with tensor cores in bf16 and fp16."""
    compile: bool = False
    """Let torch.compile translate the network: minutes before the first step, faster ones on a GPU."""
    data_on_device: Literal["auto", "device", "stream"] = "auto"
    """Keep the data set on the device, or gather each batch from memory-mapped shards; the batches are the same."""
    init_from: str = NO_WARM_START
    """A folder with a trained pipeline to take the first weights from; a DVC dependency."""
    weights: str | None = None
    """The same from a hub repository, s3://bucket/prefix or a folder that `pin` names: a published network."""
    pin: str | None = None
    full_steps: Annotated[int, Field(ge=0)] = 0
    """Before model.lora_rank's additions are trained alone, so many steps train all weights: a base where none is
    given."""
    seed: Seed = 0
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt = 100
    sample_every: PositiveInt = 250

    @model_validator(mode="after")
    def _check(self) -> TrainParams:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"train.warmup_steps {self.warmup_steps} leaves nothing of train.steps {self.steps}; lower it"
            )
        _require_pin("train", self.weights, self.pin)
        if self.weights is not None and self.init_from != NO_WARM_START:
            raise ValueError("train.weights and train.init_from both name first weights; set one of them back")
        if self.full_steps >= self.steps:
            raise ValueError(
                f"train.full_steps {self.full_steps} leaves nothing of train.steps {self.steps} to the low-rank "
                "additions; lower it"
            )
        for profile in self.ema:
            kind, _, number = profile.partition("-")
            if not (kind in AVERAGES and _NUMBER.fullmatch(number) and 0 < float(number) < AVERAGES[kind]):
                raise ValueError(
                    f"train.ema has {profile!r}; write decay-0.999 (below 1), std-0.10 (below 0.288) or gamma-6.94"
                )
        if len(set(self.ema)) < len(self.ema):
            raise ValueError("train.ema names an average twice; remove one")
        if self.pipeline_ema not in self.ema:
            raise ValueError(
                f"train.pipeline_ema {self.pipeline_ema!r} is not in train.ema; choose from {', '.join(self.ema)}"
            )
        return self


class ExtractorParams(Section):
    """What the features of the distances come from."""

    kind: Extractor = "in_domain"
    """`in_domain` is trained here on the data; the others are published, `inception` being that of the usual FID."""
    weights: str | None = None
    """A hub repository, a local folder or s3://bucket/prefix with safetensors; for `inception` also the file
    pt_inception-2015-12-05-6726825d.pth itself or its http(s) address (or env:NAME of a variable that holds that)."""
    pin: str | None = None

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
        _require_pin("judge.extractor", self.weights, self.pin)
        return self


class ScoringClipParams(Section):
    """The CLIP that scores how well images fit their captions."""

    weights: str | None = None
    """A hub repository, a local folder or s3://bucket/prefix with a published CLIP; null trains one on the captions."""
    pin: str | None = None

    @model_validator(mode="after")
    def _check(self) -> ScoringClipParams:
        _require_pin("judge.clip", self.weights, self.pin)
        return self


class JudgeParams(Section):
    extractor: ExtractorParams = ExtractorParams()
    clip: ScoringClipParams = ScoringClipParams()
    classifier_steps: PositiveInt
    """Steps of the classifier, or of the self-supervised encoder where there are neither labels nor captions."""
    clip_steps: PositiveInt
    batch_size: PositiveInt = 64
    horizontal_flip: bool = False
    """Mirror half of the training images at random; not for digits or text."""
    seed: Seed = 1


def _check_sampling(name: str, section: EvaluateParams | VisualizeParams, scales: tuple[float, ...]) -> None:
    """What sampling with eta and an interval of guidance asks for, in the section `name`."""
    if section.eta and section.sampler != "ddim":
        raise ValueError(f"{name}.eta is only read by {name}.sampler 'ddim'; set it back to 0.0")
    if section.guidance_interval is None:
        return
    low, high = section.guidance_interval
    if low >= high:
        raise ValueError(f"{name}.guidance_interval [{low:g}, {high:g}] is empty; give the lower noise level first")
    if set(scales) == {1.0}:
        raise ValueError(
            f"{name}.guidance_interval limits guidance, and a scale of 1 is none; set it to null, or raise the scale"
        )


class EvaluateParams(Section):
    sampler: Sampler
    steps: PositiveInt
    eta: Fraction = 0.0
    """Noise of the sampler 'ddim': 0 draws the same image from the same noise, 1 is as random as 'ddpm'."""
    n_distance: Annotated[int, Field(ge=2)]
    """Samples in each seed block, drawn without guidance, for the distances."""
    n_accuracy: PositiveInt
    """Samples in each seed block, drawn with `guidance_scale`, for label accuracy and CLIP score."""
    n_compare: PositiveInt
    """Samples for each other sampler's row of the table."""
    n_ddpm: PositiveInt
    """Samples of the full ancestral sampler, for the grid."""
    guidance_scale: Annotated[float, Field(ge=1)]
    guidance_interval: NoiseLevels | None = None
    """Noise levels at which to guide (Kynkäänniemi et al. 2024); null is all."""
    guidance_sweep: tuple[Annotated[float, Field(ge=1)], ...] = Field(default=(), strict=False)
    """Guidance scales of the curve of distance against CLIP score; none for an unconditional model."""
    n_sweep: Annotated[int, Field(ge=2)] = 128
    """Samples at each of them."""
    seed_blocks: Annotated[int, Field(ge=3)] = 3
    allow_small_n: bool = False
    """Measure distances over fewer than two images per feature dimension, and say so beside each number."""
    batch_size: PositiveInt = 256
    seed: Seed = 1000

    @model_validator(mode="after")
    def _check(self) -> EvaluateParams:
        _check_sampling("evaluate", self, (self.guidance_scale,))
        return self

    @property
    def sampling(self) -> Sampling:
        """The settings of guided samples; unguided ones differ in the guidance scale."""
        from models.samplers import Sampling

        return Sampling(self.sampler, self.steps, self.eta, self.guidance_scale, self.guidance_interval)


class VisualizeParams(Section):
    sampler: Sampler
    steps: PositiveInt
    eta: Fraction = 0.0
    guidance_scales: tuple[Annotated[float, Field(ge=1)], ...] = Field(strict=False, min_length=1)
    guidance_interval: NoiseLevels | None = None
    columns: PositiveInt = 10
    seed: Seed = 7

    @model_validator(mode="after")
    def _check(self) -> VisualizeParams:
        _check_sampling("visualize", self, self.guidance_scales)
        return self

    def sampling(self, guidance_scale: float) -> Sampling:
        """Return the settings of a row of samples."""
        from models.samplers import Sampling

        return Sampling(self.sampler, self.steps, self.eta, guidance_scale, self.guidance_interval)


class ExportParams(Section):
    opset: Annotated[int, Field(ge=18, le=26)] = 20
    """ONNX Runtime does not load later ones."""
    max_abs_difference: Annotated[float, Field(gt=0)] = 1e-4
    min_psnr: PositiveInt = 50
    """Decibel of the ONNX sampler's images against torch's for the same noise."""
    latency_batches: tuple[PositiveInt, ...] = Field(default=(1, 8, 32), strict=False)
    seed: Seed = 3


class RegisterParams(Section):
    model_name: str
    max_distance_over_floor: Annotated[float, Field(gt=0)]
    """Absolute gate of the first version: Frechet distance as a multiple of its floor."""
    min_label_accuracy: Fraction
    """Absolute gate; read only where label accuracy applies."""

    @model_validator(mode="after")
    def _check(self) -> RegisterParams:
        if not MODEL_NAME.fullmatch(self.model_name):
            raise ValueError(
                f"register.model_name {self.model_name!r} cannot name a model in MLflow; use at most 200 "
                "letters, digits, '-', '_' and inner spaces"
            )
        return self


class Demands(Section):
    """What later stages ask of the data: single parameters of their sections, under their dotted names."""

    conditioning: Conditioning = Field(alias="codec.conditioning")
    allow_small_n: bool = Field(alias="evaluate.allow_small_n")
    resolution: PositiveInt = Field(alias="image.resolution")
    extractor: Extractor = Field(alias="judge.extractor.kind")
    batch_size: PositiveInt = Field(alias="train.batch_size")

    @property
    def images_for_distances(self) -> int:
        """How many held-out images the distances need; 2 where a published network's width is not known yet."""
        return 2 if self.allow_small_n else images_for_distances(self.extractor, self.resolution)


def images_for_distances(extractor: Extractor, resolution: int) -> int:
    """How many images on each side the distances need, in the features of `judge.extractor`: at least 2, which is the
    answer for published networks of several widths, too."""
    dimensions = {"in_domain": stage_widths(resolution)[-1], "inception": INCEPTION}.get(extractor, 1)
    return IMAGES_PER_DIMENSION * dimensions


class Params(Section):
    preset: str
    download: DownloadParams
    ingest: IngestParams
    validation: ValidateParams = Field(alias="validate")
    image: ImageParams
    codec: CodecParams
    encode: EncodeParams
    model: ModelParams
    diffusion: DiffusionParams
    train: TrainParams
    judge: JudgeParams
    evaluate: EvaluateParams
    visualize: VisualizeParams
    export: ExportParams
    register_: RegisterParams = Field(alias="register")

    @model_validator(mode="after")
    def _check(self) -> Params:
        self._check_sides()
        if self.codec.conditioning != "text" and self.model.text_only:
            name = next(iter(self.model.text_only))
            raise ValueError(f"model.{name} belongs to codec.conditioning 'text'; set it to null (or false)")
        given = self.train.init_from != NO_WARM_START or self.train.weights is not None
        if self.model.lora_rank and not (given or self.train.full_steps):
            raise ValueError(
                "model.lora_rank adds to trained weights; name them in train.weights or train.init_from, or let "
                "train.full_steps train them first"
            )
        self._check_published()
        if self.train.full_steps and not self.model.lora_rank:
            raise ValueError("train.full_steps is only read with model.lora_rank; set it to 0")
        for section, steps in (("evaluate", self.evaluate.steps), ("visualize", self.visualize.steps)):
            if steps > self.diffusion.timesteps:
                raise ValueError(
                    f"{section}.steps {steps} exceeds diffusion.timesteps {self.diffusion.timesteps}; lower it"
                )
        if self.codec.conditioning == "none" and (
            self.evaluate.guidance_scale != 1
            or set(self.visualize.guidance_scales) != {1.0}
            or self.evaluate.guidance_sweep
        ):
            raise ValueError(
                "guidance needs a condition, but codec.conditioning is 'none'; set evaluate.guidance_scale to 1.0, "
                "evaluate.guidance_sweep to [] and visualize.guidance_scales to [1.0]"
            )
        if self.codec.conditioning != "none" and self.train.condition_dropout == 1:
            raise ValueError(
                "train.condition_dropout 1 never shows the network its condition; lower it, or set codec.conditioning "
                "to 'none'"
            )
        guided = {
            "evaluate.guidance_scale": (self.evaluate.guidance_scale,),
            "evaluate.guidance_sweep": self.evaluate.guidance_sweep,
            "visualize.guidance_scales": self.visualize.guidance_scales,
        }
        for key, scales in guided.items():
            if self.train.condition_dropout == 0 and any(scale != 1 for scale in scales):
                raise ValueError(
                    f"{key} other than 1 needs a model trained without its condition now and then; "
                    "set train.condition_dropout above 0"
                )
        if self.train.batch_size % self.train.gradient_accumulation:
            raise ValueError("train.gradient_accumulation must divide train.batch_size")
        self._check_source()
        self._check_distances()
        return self

    def _check_source(self) -> None:
        """Sources of which it is known whether they have labels or captions."""
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

    def _check_published(self) -> None:
        """A published network knows the latents and embeddings that it was trained on, in their units, alone."""
        if self.train.weights is None:
            return
        autoencoder = self.codec.autoencoder
        if self.codec.kind == "autoencoder" and (autoencoder.weights is None or autoencoder.scaling != "published"):
            raise ValueError(
                "train.weights names a network that draws the latents of its own autoencoder in their published units; "
                "name that in codec.autoencoder.weights and set codec.autoencoder.scaling to 'published'"
            )
        if self.codec.conditioning == "text" and self.codec.text.weights is None:
            raise ValueError(
                "train.weights names a network that reads the embeddings of its own text encoder; name that in "
                "codec.text.weights"
            )

    def _check_sides(self) -> None:
        """Both networks halve what they get a number of times, and mirrored latents are made before they are drawn."""
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
        halvings = len(self.model.block_out_channels) - 1
        if side % 2**halvings:
            raise ValueError(
                f"{what} {side} cannot be halved {halvings} times; "
                f"use a multiple of {2**halvings} or fewer model.block_out_channels"
            )
        if self.codec.kind == "autoencoder" and self.train.horizontal_flip != self.encode.horizontal_flip:
            raise ValueError(
                "train.horizontal_flip draws the mirrored latents that encode.horizontal_flip makes; "
                "set both or neither"
            )
        if self.codec.kind == "identity" and self.encode.horizontal_flip:
            raise ValueError(
                "encode.horizontal_flip is for latents; pixels are mirrored as they are drawn, by train.horizontal_flip"
            )

    def _check_buckets(self) -> None:
        """The sides of a bucket are halved as often as those of the square."""
        if not self.encode.buckets:
            return
        widths = self.codec.autoencoder.widths if self.codec.kind == "autoencoder" else (0,)
        least = 2 ** (len(widths) - 1 + len(self.model.block_out_channels) - 1)
        multiple, size = self.encode.bucket_multiple, self.image.resolution
        if multiple % least or size % multiple:
            raise ValueError(
                f"encode.bucket_multiple {multiple} must be a multiple of {least}, by which codec and model shrink an "
                f"image, and divide image.resolution {size}; change it, or set encode.buckets to []"
            )

    def section(self, kind: type[Section]) -> Any:
        """The one section of type `kind`, or what `Demands` takes from several."""
        if kind is Demands:
            return Demands.model_validate({name: attrgetter(name)(self) for name in names_of(Demands)})
        return next(getattr(self, name) for name, field in type(self).model_fields.items() if field.annotation is kind)


def names_of(kind: type[Section]) -> list[str]:
    """The keys in `params.yaml` under which what a section of type `kind` holds stands: one, but for `Demands`."""
    if kind is Demands:
        return [str(field.alias) for field in Demands.model_fields.values()]
    return [field.alias or name for name, field in Params.model_fields.items() if field.annotation is kind]


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys that a section may hold, at any depth."""
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        yield key
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{key}.")


def _own(section: str) -> list[str]:
    """Keys of one section, or of the whole file for ''."""
    parted = (key.rpartition(".") for key in _keys(Params))
    return [name for parent, _, name in parted if parent == section]


MEANT = 3
"""Keys of the same name that are suggested for an unknown one, at most."""


def _meant(location: tuple[Any, ...]) -> str:
    """What an unknown key may stand for: one of its own section, else one of that name in another, else all."""
    *parents, name = map(str, location)
    known, own = list(_keys(Params)), _own(".".join(parents))
    if close := difflib.get_close_matches(name, own, n=1):
        return f"did you mean '{close[0]}'?"
    if close := difflib.get_close_matches(name, {key.rpartition(".")[2]: key for key in known}, n=1):
        meant = [key for key in known if key.rpartition(".")[2] == close[0]]
        return f"did you mean {' or '.join(sorted(meant, key=lambda key: key.count('.'))[:MEANT])}?"
    return f"known keys: {', '.join(own)}"


def _sentence(error: ValidationError) -> str:
    """The first complaint of pydantic as one sentence that names key and remedy."""
    first = error.errors()[0]
    location = tuple(first["loc"])
    key = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        return f"unknown parameter '{key}'; {_meant(location)}"
    if first["type"] == "missing":
        return f"parameter '{key}' is missing; add it, or write the file anew with 'python -m tasks.preset NAME'"
    if first["type"] == "model_type":
        return f"'{key}' is a section and not a value; set one of its keys, such as {key}.{_own(key)[0]}"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    return f"parameter '{key}' is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def parse(document: Any) -> Params:
    """Validate a parsed `params.yaml`. Raises `ParamsError` with one sentence."""
    if not isinstance(document, dict):
        raise ParamsError("params.yaml holds no sections; write it with 'python -m tasks.preset digits'")
    _refuse_secrets(document, ())
    try:
        return Params.model_validate(document)
    except ValidationError as error:
        raise ParamsError(redacted(_sentence(error))) from None


def _refuse_secrets(value: Any, where: tuple[str, ...]) -> None:
    """Raise `ParamsError` for an address with a password or a token: parameters go to dvc.lock, the caches and MLflow.

    Looks at every string at any depth, so that no address parameter of today or tomorrow is left out.
    """
    if isinstance(value, dict):
        for name, entry in value.items():
            _refuse_secrets(entry, (*where, str(name)))
    elif isinstance(value, list | tuple):
        for entry in value:
            _refuse_secrets(entry, where)
    elif isinstance(value, str) and (found := secret_in_address(value)):
        raise ParamsError(
            f"{'.'.join(where)} holds {found}, which would be recorded in dvc.lock and MLflow; {_remedy(where, value)}"
        )


def _remedy(where: tuple[str, ...], address: str) -> str:
    if not address.startswith(("http://", "https://")) or where[-1] == "endpoint_url":
        return "remove it, and put credentials into the environment or the AWS profile"
    return (
        "remove it, and put user and password into ~/.netrc, or the whole address into an environment variable, such "
        f"as AFTERIMAGE_URL, and write {where[-1]}: env:AFTERIMAGE_URL"
    )


def read(path: Path = Path("params.yaml")) -> Any:
    """The parsed document at `path`, not validated. Raises `ParamsError` with one sentence.

    As YAML 1.2, which DVC reads and writes: there `no` is a string and 1e-05 a number.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path} does not exist; write it with 'python -m tasks.preset digits'") from None
    except UnicodeDecodeError:
        raise ParamsError(f"{path} is not UTF-8; save it as UTF-8, or write it anew with tasks.preset") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ParamsError(f"{path} is not valid YAML{where}; correct it, or write it anew with tasks.preset") from None


def load(path: Path = Path("params.yaml")) -> Params:
    """Read and validate `path`. Raises `ParamsError` with one sentence."""
    return parse(read(path))
