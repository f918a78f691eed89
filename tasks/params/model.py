"""Parameters of the model: the sections `model`, `diffusion` and `train`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tasks.params.distil import DistilParams
from tasks.params.section import (
    LOCAL,
    NO_PATH,
    Compile,
    Fraction,
    GradientCheckpointing,
    PositiveInt,
    Section,
    Seed,
    require_pin,
)

AVERAGES = {"decay": 1.0, "std": 0.288, "gamma": 1e4}
"""Averaging profile -> exclusive upper bound of its number in `train.ema`."""
_NUMBER = re.compile(r"\d+(\.\d+)?")
Architecture = Literal["unet", "dit"]


class DitParams(Section):
    """The transformer of model.architecture 'dit' (Peebles & Xie 2023)."""

    patch_size: PositiveInt = 2
    """Side of the patches of the image or latent; each becomes one token."""
    width: PositiveInt = 384
    """Width of a token."""
    depth: PositiveInt = 12
    """Number of blocks."""
    heads: PositiveInt = 6
    """Attention heads per block."""
    mlp_ratio: Annotated[float, Field(ge=1)] = 4.0
    """Hidden width of the feed-forward layers relative to `width`; diffusers' transformers have 4."""
    qk_norm: bool = False
    """Normalise queries and keys, which keeps large networks stable; diffusers' transformers lack it."""
    rope: bool = False
    """Rotary positions in the attention instead of sinusoidal ones on the tokens; diffusers' transformers lack it."""

    @model_validator(mode="after")
    def _check(self) -> DitParams:
        if self.width % self.heads:
            raise ValueError(f"model.dit.heads {self.heads} does not divide model.dit.width {self.width}; change one")
        if self.width % 4:
            raise ValueError(
                f"model.dit.width {self.width} must be a multiple of 4, for sines and cosines of two coordinates"
            )
        if self.rope and self.width // self.heads % 4:
            raise ValueError(
                f"model.dit.rope rotates pairs in two directions, and the width {self.width // self.heads} of a head "
                "is no multiple of 4; change model.dit.width or model.dit.heads, or set model.dit.rope to false"
            )
        return self


class ModelParams(Section):
    """The network: a U-Net, or the transformer that `dit` describes.

    Names are those of diffusers' `UNet2DModel`, or of `UNet2DConditionModel` for text; a transformer has `dropout` and
    the section `dit` alone.
    """

    architecture: Architecture = "unet"
    """`unet`, or `dit` for a diffusion transformer."""
    block_out_channels: tuple[PositiveInt, ...] = Field(strict=False)
    """Channels per resolution, highest first; each level but the last halves the side."""
    attention: tuple[bool, ...] = Field(strict=False)
    """Per resolution, highest first: whether it has self-attention and, for text, cross-attention."""
    layers_per_block: PositiveInt
    """Residual blocks per resolution of the encoder; the decoder has one more."""
    norm_num_groups: PositiveInt
    """Groups of each group norm; a divisor of all widths."""
    attention_head_dim: PositiveInt | None
    """Channels per attention head; null is one head."""
    patch_size: PositiveInt = 1
    """Not for text: side p of the patches whose pixels are channels of the U-Net's first and last layer, so that it
    computes on 1/p^2 of the positions (Luhman & Luhman 2022). A transformer has `dit.patch_size`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an activation in the residual or feed-forward blocks."""
    heads: PositiveInt | None = None
    """Text only: number of attention heads at every resolution, instead of `attention_head_dim`."""
    transformer_layers: tuple[PositiveInt, ...] | None = Field(default=None, strict=False)
    """Text only: transformer blocks per attention layer at each resolution; null is one."""
    linear_projection: bool = False
    """Text only: linear instead of convolutional projections around a transformer, as in Stable Diffusion 2 and XL."""
    lora_rank: PositiveInt | None = None
    """Text only: train a LoRA adapter of this rank on the base weights of `train.weights` or `train.init_from`; null
    trains all weights."""
    control_widths: tuple[PositiveInt, ...] | None = Field(default=None, strict=False, min_length=1)
    """Text only: train a ControlNet (Zhang et al. 2023) for the frozen base weights of `train.weights`,
    `train.init_from` or `train.full_steps`. The widths are those of the layers that read the control map; each after
    the first halves its side, down to that of the network's input. Null trains the network itself."""
    dit: DitParams = DitParams()

    @property
    def downsampling(self) -> int:
        """Factor of which both sides of the network's input must be a multiple."""
        if self.architecture == "dit":
            return self.dit.patch_size
        return self.patch_size * 2 ** (len(self.block_out_channels) - 1)

    def used(self) -> dict[str, object]:
        """Return the parameters of the chosen network; those of the section `dit` by dotted names."""
        if self.architecture == "unet":
            return self.model_dump(exclude={"dit"})
        dit = {f"dit.{name}": value for name, value in self.dit.model_dump().items()}
        return {"architecture": self.architecture, "dropout": self.dropout, **dit}

    @property
    def text_only(self) -> dict[str, object]:
        """Options of the text-conditional network that are set."""
        names = ("heads", "transformer_layers", "linear_projection", "lora_rank", "control_widths")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    @model_validator(mode="after")
    def _check(self) -> ModelParams:
        if self.architecture == "unet":
            self._check_unet()
        elif self.text_only:
            name = next(iter(self.text_only))
            raise ValueError(f"model.{name} belongs to model.architecture 'unet'; set it to null (or false)")
        return self

    def _check_unet(self) -> None:
        if not self.block_out_channels:
            raise ValueError("model.block_out_channels is empty; give the widths of model.architecture 'unet'")
        if self.heads is not None and self.attention_head_dim is not None:
            raise ValueError("model.heads and model.attention_head_dim exclude each other; set one of them to null")
        if self.transformer_layers is not None and len(self.transformer_layers) != len(self.block_out_channels):
            raise ValueError("model.transformer_layers needs one number per entry of model.block_out_channels")
        if len(self.attention) != len(self.block_out_channels):
            raise ValueError(
                f"model.attention has {len(self.attention)} flags for {len(self.block_out_channels)} resolutions; "
                "give one per entry of model.block_out_channels"
            )
        if self.block_out_channels[0] % 2:
            raise ValueError(
                f"the first of model.block_out_channels is {self.block_out_channels[0]}, but the time embedding "
                "consists of as many sines as cosines; make it even"
            )
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(f"model.norm_num_groups {self.norm_num_groups} does not divide the width {width}")
            if self.attention_head_dim and width % self.attention_head_dim:
                raise ValueError(f"model.attention_head_dim {self.attention_head_dim} does not divide {width}")
            if self.heads and width % self.heads:
                raise ValueError(f"model.heads {self.heads} does not divide the width {width}")


class DiffusionParams(Section):
    """The noise schedule and the training objective."""

    schedule: Literal["linear", "cosine", "sigmoid", "scaled_linear", "rectified_flow"]
    """Path from images to noise: a noise schedule ("scaled_linear" is that of Stable Diffusion), or the straight path
    of flow matching."""
    timesteps: Annotated[int, Field(ge=2)]
    """T; on a rectified flow the timestep of pure noise."""
    prediction: Literal["epsilon", "sample", "v_prediction", "flow_prediction"]
    """Output of the network: the noise, the clean image, v, or a flow's velocity (names of diffusers)."""
    timestep_density: Literal["uniform", "logit_normal", "normal_log_snr"] = "uniform"
    """Distribution of the training timesteps: t / T uniform, t / T logit-normal (Esser et al. 2024), or log SNR normal
    (Karras et al. 2022)."""
    density_mean: float = 0.0
    """Mean of the normal distribution: of logit(t / T), or of log SNR."""
    density_std: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation of that normal distribution."""
    shift: Annotated[float, Field(gt=0)] = 1.0
    """Above 1 moves training timesteps, and on a rectified flow those of the samplers, towards noise, as higher
    resolutions need (3 in Esser et al. 2024 at 1024 pixels)."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last timestep is pure noise (Lin et al. 2024)."""
    loss_weighting: Literal["plain", "min_snr"] = "plain"
    """Weight of the loss by noise level: 1 everywhere, or min(SNR, gamma) on the error of the clean image."""
    min_snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    """Gamma of loss_weighting 'min_snr'; 5 in the paper (Hang et al. 2023)."""

    @model_validator(mode="after")
    def _check(self) -> DiffusionParams:
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "diffusion.zero_terminal_snr makes the last timestep pure noise, from which epsilon cannot be learned; "
                "set diffusion.prediction to 'v_prediction' or 'sample', or diffusion.zero_terminal_snr to false"
            )
        if self.zero_terminal_snr and self.loss_weighting == "min_snr":
            raise ValueError(
                "diffusion.loss_weighting 'min_snr' gives the last timestep, where sampling begins, a weight of 0 with "
                "diffusion.zero_terminal_snr; set diffusion.loss_weighting to 'plain'"
            )
        self._check_flow()
        self._check_density()
        return self

    def _check_flow(self) -> None:
        """A rectified flow predicts the velocity, a noise schedule does not; the flow begins at pure noise."""
        flow = self.schedule == "rectified_flow"
        if flow != (self.prediction == "flow_prediction"):
            fitting = "'flow_prediction'" if flow else "'epsilon', 'sample' or 'v_prediction'"
            raise ValueError(
                f"diffusion.prediction '{self.prediction}' does not fit diffusion.schedule '{self.schedule}'; set it "
                f"to {fitting}"
            )
        if flow and self.zero_terminal_snr:
            raise ValueError(
                "diffusion.zero_terminal_snr rescales noise schedules; diffusion.schedule 'rectified_flow' begins at "
                "pure noise anyway: set it to false"
            )
        if flow and self.loss_weighting == "min_snr":
            raise ValueError(
                "diffusion.loss_weighting 'min_snr' gives pure noise, where a rectified flow begins, a weight of 0; "
                "set it to 'plain', and choose a diffusion.timestep_density instead"
            )

    def _check_density(self) -> None:
        if self.timestep_density == "uniform" and (self.density_mean, self.density_std) != (0.0, 1.0):
            raise ValueError(
                "diffusion.density_mean and diffusion.density_std are not read by diffusion.timestep_density "
                "'uniform'; set them back to 0.0 and 1.0"
            )


class TrainParams(Section):
    """The optimization of the network."""

    steps: PositiveInt
    """Optimizer steps."""
    batch_size: PositiveInt
    """Images per optimizer step, over all processes and accumulated parts."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` trains the hidden matrices and convolutions by Muon (Jordan et al. 2024) and the rest by AdamW."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)]
    """Of AdamW, at its peak."""
    muon_learning_rate: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Of Muon, at its peak; it follows the same schedule as `learning_rate`."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Momentum of Muon."""
    lr_schedule: Literal["constant", "cosine"]
    """After the warm-up: constant (a run with more steps then continues a shorter one) or a half cosine down to 0."""
    warmup_steps: Annotated[int, Field(ge=0)]
    """Steps of the linear warm-up of the learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay of AdamW and Muon."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient; a larger gradient is scaled down to it."""
    ema: tuple[str, ...] = Field(strict=False, min_length=1)
    """Averages of the weights: exponential (decay-0.999) or power-law (std-0.10 or gamma-6.94)."""
    pipeline_ema: str
    """Average that is saved as the pipeline; choosing another one later needs no more training."""
    ema_every: PositiveInt = 1
    """Steps between two updates of the averages, each with the decay of all these steps; a divisor of `steps`."""
    ema_snapshots: Annotated[int, Field(ge=0)] = 0
    """Most snapshots of each power-law average that are kept over the run, for `tasks.reconstruct`; 0 keeps none."""
    condition_dropout: Fraction
    """Probability that a sample is trained without its condition (for classifier-free guidance)."""
    horizontal_flip: bool = False
    """Mirror training images with probability 0.5; not for digits or text."""
    precision: Literal["no", "tf32", "bf16", "fp16"] = "no"
    """`no` is float32 in full; `tf32` is float32 whose convolutions and matrix products a GPU computes in TF32, with 10
    bits of mantissa (on a CPU it is `no`); `bf16` and `fp16` are automatic mixed precision."""
    gradient_accumulation: PositiveInt = 1
    """Parts that a batch is divided into, to save memory."""
    gradient_checkpointing: GradientCheckpointing = False
    """Recompute the activations of each block in the backward pass: less memory, a third more time. 'auto' does so if
    the free memory of the device cannot hold them."""
    channels_last: bool = False
    """Memory format of the convolutions; faster in bf16 and fp16 on GPUs with tensor cores, and for small networks in
    float32 on a CPU."""
    compile: Compile = False
    """Compile the network with torch.compile: minutes before the first step, then faster steps on a GPU. 'gpu' compiles
    on a GPU, and not on a CPU."""
    deterministic: bool = False
    """Use only kernels whose results do not vary, so that a run on a GPU gives the same bytes again, but slower."""
    data_on_device: Literal["auto", "device", "stream"] = "auto"
    """Keep the data set on the device, or read each batch from memory-mapped shards; the batches are equal."""
    data: str = LOCAL
    """`local` reads the shards in data/latents; s3://bucket/prefix reads those that `python -m infra.upload_latents`
    put there, by ranges. The batches are equal."""
    data_cache_bytes: PositiveInt = 1 << 30
    """Most bytes of S3 shards that are kept in memory."""
    init_from: str = NO_PATH
    """Folder of a trained pipeline whose weights initialize the network; a DVC dependency."""
    weights: str | None = None
    """The same from a hub repository, s3://bucket/prefix or a folder, pinned by `pin`."""
    pin: str | None = None
    """Identifies `weights`: the commit of a hub repository, or the SHA-256 of the weights' file."""
    full_steps: Annotated[int, Field(ge=0)] = 0
    """With model.lora_rank or model.control_widths: the number of steps that train all weights before the adapter or
    the ControlNet, if no base weights are given."""
    control_dropout: Fraction | None = None
    """Probability that the ControlNet is trained with an empty control map; null trains without a ControlNet."""
    guide_step: Annotated[int, Field(ge=0)] = 0
    """Step whose averaged weights are saved beside the final ones, as the guide of autoguidance (Karras et al. 2024b);
    0 saves none."""
    prior_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the class images in the loss of DreamBooth; 0 trains without them. Read with prior.instance_prompt."""
    text_encoder: bool = False
    """Train the text encoder as well, with prior.instance_prompt (DreamBooth)."""
    distil: DistilParams | None = None
    """Consistency tuning, after which few sampling steps suffice; null trains without it."""
    seed: Seed = 0
    """Seed of the first weights, the noise, the timesteps and the order of the images."""
    log_every: PositiveInt = 10
    """Steps between two rows of the training curves."""
    checkpoint_every: PositiveInt = 100
    """Steps between two checkpoints."""
    sample_every: PositiveInt = 250
    """Steps between two grids of samples and measurements of the held-out loss."""

    @property
    def mixed_precision(self) -> str:
        """What accelerate is set to; TF32 is the arithmetic of float32, which `models.device.set_arithmetic` sets."""
        return "no" if self.precision == "tf32" else self.precision

    def phase(self, step: int) -> range:
        """Return the steps of the phase of 0-based `step`: the training, or what follows it.

        That is the consistency tuning, or the training of a ControlNet after that of its U-Net.
        """
        if self.distil is None and self.control_dropout is None:
            return range(self.steps)
        after = self.distil.after if self.distil else self.full_steps
        return range(after) if step < after else range(after, self.steps)

    def learning_rate_factor(self, step: int) -> float:
        """Return the factor of the peak learning rate at 0-based `step`."""
        return self.distil.learning_rate_factor if self.distil and step >= self.distil.after else 1.0

    @model_validator(mode="after")
    def _check_data(self) -> TrainParams:
        if self.data != LOCAL and not re.fullmatch(r"s3://[^/]+(/.*)?", self.data):
            raise ValueError(f"train.data {self.data!r} is neither 'local' nor s3://bucket/prefix; correct it")
        if self.data != LOCAL and self.data_on_device == "device":
            raise ValueError("train.data is read from S3, so train.data_on_device must be 'auto' or 'stream'")
        return self

    @model_validator(mode="after")
    def _check(self) -> TrainParams:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"train.warmup_steps {self.warmup_steps} leaves nothing of train.steps {self.steps}; lower it"
            )
        require_pin("train", self.weights, self.pin)
        if self.weights is not None and self.init_from != NO_PATH:
            raise ValueError("train.weights and train.init_from both name initial weights; reset one of them")
        if self.full_steps >= self.steps:
            raise ValueError(
                f"train.full_steps {self.full_steps} leaves nothing of train.steps {self.steps} to the LoRA "
                "adapter or the ControlNet; lower it"
            )
        if self.guide_step >= self.steps:
            raise ValueError(
                f"train.guide_step {self.guide_step} is not before the end, train.steps {self.steps}; lower it, or set "
                "it to 0"
            )
        for profile in self.ema:
            kind, _, number = profile.partition("-")
            if not (kind in AVERAGES and _NUMBER.fullmatch(number) and 0 < float(number) < AVERAGES[kind]):
                raise ValueError(
                    f"train.ema has {profile!r}; write decay-0.999 (below 1), std-0.10 (below 0.288) or gamma-6.94"
                )
        self._check_ema_every()
        if self.ema_snapshots and all(profile.startswith("decay-") for profile in self.ema):
            raise ValueError(
                f"train.ema_snapshots {self.ema_snapshots} keeps power-law averages, and train.ema has none; add "
                "std-0.05 and std-0.10 to it, or set train.ema_snapshots to 0"
            )
        if len(set(self.ema)) < len(self.ema):
            raise ValueError("train.ema names an average twice; remove one")
        if self.pipeline_ema not in self.ema:
            raise ValueError(
                f"train.pipeline_ema {self.pipeline_ema!r} is not in train.ema; choose from {', '.join(self.ema)}"
            )
        return self

    def _check_ema_every(self) -> None:
        """Averages are read at these steps, and must then include the last ones."""
        read = {"train.steps": self.steps, "train.guide_step": self.guide_step}
        if self.full_steps and self.control_dropout is not None:
            read["train.full_steps"] = self.full_steps
        if self.distil:
            read["train.distil.after"] = self.distil.after
        if self.ema_snapshots:
            read["the distance of two snapshots,"] = snapshot_spacing(self.steps, self.ema_snapshots)
        for name, step in read.items():
            if step % self.ema_every:
                raise ValueError(
                    f"train.ema_every {self.ema_every} does not divide {name} {step}, where the averages are read; "
                    "choose a divisor"
                )


def snapshot_spacing(steps: int, most: int) -> int:
    """Return the steps between two snapshots of the averages: the smallest power of two that gives at most `most`.

    A longer run needs no others of the steps of a shorter one, so it may continue from the checkpoints of that.
    """
    spacing = 1
    while steps // spacing > most:
        spacing *= 2
    return spacing
