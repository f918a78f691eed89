"""Sampling by DDIM and DPM-Solver++ in four forms of one network, and how far each is from fp32.

The network is trained for a few seconds first: the images of random weights are clipped almost everywhere, and would
hide or exaggerate differences.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from infra.bench.gpu import recipe
from infra.bench.gpu.plan import Row, Send, Setting
from infra.bench.gpu.timing import attempt, peak_gigabytes, psnr, seconds_for, seconds_per_call, supports_bf16, timed
from infra.bench.gpu.training import COMPILED, FP32, NHWC, Form, Images, Trainer
from models.device import set_arithmetic
from models.networks.unet import UNet
from models.noise.samplers import Sampling, SchedulerConfig, denoiser, sample

PART = "sampling"
BATCH, SMALLEST_BATCH = 512, 16
TRAINING_SECONDS, TRAINING_STEPS = 8.0, 300
FORMS: tuple[tuple[str, Form, bool], ...] = (
    ("fp32", FP32, False),
    ("bf16 by autocast", Form("bf16"), False),
    ("bf16 weights, NHWC", NHWC, True),
    ("bf16 weights, NHWC, compiled", COMPILED, True),
)
"""Name, form, and whether the weights are cast instead of the operations."""
SAMPLINGS = {"DDIM-50": Sampling("ddim", 50), "DPM-Solver++-20": Sampling("dpm_solver_pp_2m", 20)}
TINY_SAMPLINGS = {"DDIM-2": Sampling("ddim", 2), "DPM-Solver++-2": Sampling("dpm_solver_pp_2m", 2)}


Predict: TypeAlias = "Callable[[Tensor, float, object], Tensor]"
"""`predict(x, t, condition)`, float32 in and out; the condition is None."""


@dataclass(frozen=True)
class Case:
    """A form of the network with a sampler, one of the keys of the samplings."""

    name: str
    precision: str
    sampling: str
    predict: Predict


@dataclass
class Sampler:
    """Draws batches of images by a network, from the same noise in every form."""

    network: UNet
    setting: Setting
    batch: int
    drawn: dict[str, Tensor] = field(default_factory=dict)
    """The fp32 images by name of the sampling, float32 [batch, C, S, S]."""

    def __post_init__(self) -> None:
        config, generator = self.network.config, torch.Generator(self.setting.device).manual_seed(0)
        shape = (self.batch, config.channels, config.size, config.size)
        self.noise = torch.randn(shape, generator=generator, device=self.setting.device)

    def form(self, form: Form, cast: bool) -> Predict:
        """Return `predict(x, t, condition)` of the network in a form: float32 in and out."""
        device, dtype = self.setting.device, torch.bfloat16 if cast else torch.float32
        network = UNet(self.network.config).eval().requires_grad_(False)
        network.load_state_dict(self.network.state_dict())
        layout = torch.channels_last if form.channels_last else torch.contiguous_format
        network = network.to(device, dtype, memory_format=layout)  # type: ignore[call-overload]
        module = form.compile(network, self.setting.tiny)
        autocast = form.precision == "bf16" and not cast

        def predict(x: Tensor, t: float, condition: object) -> Tensor:
            del condition
            times = torch.full((len(x),), t, dtype=torch.int64, device=device)
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                return module(x.to(dtype), times).float()

        return predict

    def draw(self, predict: Predict, sampling: Sampling) -> Tensor:
        """Draw a batch of images, float32 [batch, C, S, S] in [-1, 1]."""
        scheduler = SchedulerConfig(recipe.noise_path(), recipe.PREDICTION)
        with torch.inference_mode():
            images: Tensor = sample(denoiser(predict, scheduler), lambda: self.noise, scheduler, sampling)
        return images


def measure(setting: Setting, send: Send) -> None:
    set_arithmetic()
    network = _trained(setting)
    sampler = Sampler(network, setting, _batch(network, setting))
    for name, form, cast in FORMS:
        if form.precision == "bf16" and not supports_bf16(setting.device):
            send(Row(PART, name, skipped="this GPU has no bfloat16"))
            continue
        predict = sampler.form(form, cast)
        for title in TINY_SAMPLINGS if setting.tiny else SAMPLINGS:
            case = Case(f"{title}, {name}", form.precision, title, predict)
            send(attempt(setting, PART, case.name, partial(_measured, sampler, case)))


def _trained(setting: Setting) -> UNet:
    """Train a network for some seconds on the random images."""
    config = recipe.config_of(setting.tiny)
    images = Images(64 if setting.tiny else 8192, config, setting.device)
    trainer = Trainer(config, NHWC if supports_bf16(setting.device) else FP32, setting.device, setting.tiny)
    began, steps = time.monotonic(), 2 if setting.tiny else TRAINING_STEPS
    while trainer.steps < steps and time.monotonic() - began < TRAINING_SECONDS:
        trainer.step(*images.draw(4 if setting.tiny else recipe.BATCH, trainer.steps))
        if setting.device == "cuda":
            torch.cuda.synchronize()
    return trainer.network.eval().requires_grad_(False)


def _batch(network: UNet, setting: Setting) -> int:
    """Return the batch size: less than `BATCH` on a GPU that would need the part's time for a few batches."""
    if setting.tiny:
        return 2
    batch = BATCH
    while batch > SMALLEST_BATCH:
        x = torch.zeros(batch, 3, network.config.size, network.config.size, device=setting.device)
        t = torch.zeros(batch, dtype=torch.int64, device=setting.device)
        with torch.inference_mode():
            network(x, t)
            once = timed(lambda: network(x, t), setting.device)  # noqa: B023 - called at once
        if 50 * once < setting.left() / 20:
            break
        batch //= 2
    return batch


def _measured(sampler: Sampler, case: Case) -> Row:
    setting, drawn = sampler.setting, list[Tensor]()
    sampling = (TINY_SAMPLINGS if setting.tiny else SAMPLINGS)[case.sampling]
    first = timed(lambda: drawn.append(sampler.draw(case.predict, sampling)), setting.device)
    reference = sampler.drawn.setdefault(case.sampling, drawn[0])  # the first form is fp32
    seconds = seconds_per_call(lambda: sampler.draw(case.predict, sampling), setting.device, seconds_for(setting, 2.0))
    return Row(
        PART,
        case.name,
        batch=sampler.batch,
        precision=case.precision,
        img_s=sampler.batch / seconds,
        ms=1000 * seconds,
        first_s=first,
        peak_gb=peak_gigabytes(setting.device),
        psnr_db=psnr(drawn[0], reference, peak=2.0),
    )
