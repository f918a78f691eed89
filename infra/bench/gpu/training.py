"""The training ladder: the project's step in fp32, bf16, NHWC and compiled, at several batch sizes.

A step is what `tasks/train.py` does between two log lines, with this project's network, objective, optimizer and
averages, but without accelerate, which many images for GPUs lack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from infra.bench.gpu import recipe
from infra.bench.gpu.plan import Row, Send, Setting
from infra.bench.gpu.timing import (
    attempt,
    peak_flops,
    peak_gigabytes,
    profiled,
    seconds_for,
    seconds_per_call,
    supports_bf16,
    timed,
)
from models.device import set_arithmetic
from models.images.pixels import from_uint8
from models.networks.unet import UNet, UNetConfig
from models.optimization.adamw import AdamW
from models.optimization.diffusion import add_noise, squared_error, target
from models.optimization.ema import EMA
from models.optimization.timesteps import Timesteps

PART = "training"
IMAGES = 50_000


@dataclass(frozen=True)
class Form:
    """How the network is executed."""

    precision: str
    channels_last: bool = False
    compiled: bool = False
    graphs: bool = False
    """Replay the compiled code as CUDA graphs, with one launch each."""

    @property
    def name(self) -> str:
        names = [self.precision, "NHWC" if self.channels_last else "NCHW"]
        return ", ".join([*names, *(["compiled"] if self.compiled else []), *(["CUDA graphs"] if self.graphs else [])])

    def compile(self, module: torch.nn.Module, tiny: bool) -> Callable[..., Tensor]:
        """Return the module compiled for fixed shapes, or as it is; the tiny form traces it and generates no code."""
        if not self.compiled:
            return module
        torch.compiler.reset()  # what was compiled before is not used again
        options: dict[str, Any] = {"backend": "eager"} if tiny else {}  # arguments of torch.compile
        if self.graphs and not tiny:
            options["mode"] = "reduce-overhead"
        return torch.compile(module, dynamic=False, **options)


FP32, TF32, BF16, NHWC = Form("fp32"), Form("tf32"), Form("bf16"), Form("bf16", channels_last=True)
COMPILED = Form("bf16", channels_last=True, compiled=True)
LADDER: tuple[tuple[Form, int], ...] = (
    (FP32, 128),
    (TF32, 128),
    (BF16, 128),
    (NHWC, 128),
    (COMPILED, 128),
    (COMPILED, 512),
    (COMPILED, 1024),
    (NHWC, 512),
    (Form("bf16", channels_last=True, compiled=True, graphs=True), 128),
    (COMPILED, 256),
    (Form("bf16", compiled=True), 512),
)
"""In this order, so that a slow compiler leaves out the least informative ones."""
TINY_LADDER = ((FP32, 4), (BF16, 4), (NHWC, 4), (COMPILED, 4))


class Images:
    """Images on the device; a batch is drawn like those of `tasks/training/batches.py`."""

    def __init__(self, count: int, config: UNetConfig, device: str) -> None:
        self.pixels = recipe.random_images(count, config.size).to(device)
        self.timesteps = Timesteps(recipe.noise_path(), torch.device(device))
        self.device = device
        self._order, self._position = torch.randperm(count), 0

    def draw(self, batch: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (x0, eps, t) of a step: float32 [batch, 3, S, S] twice, int64 [batch]."""
        generator = torch.Generator(self.device).manual_seed(step)
        self._position = (self._position + batch) % (len(self._order) - batch)
        rows = self._order[self._position : self._position + batch].to(self.device, non_blocking=True)
        flipped = torch.rand(batch, generator=generator, device=self.device) < 0.5
        x0 = from_uint8(self.pixels[rows])
        x0 = torch.where(flipped[:, None, None, None], x0.flip(3), x0)
        t = self.timesteps.draw(batch, generator)
        return x0, torch.randn(x0.shape, generator=generator, device=self.device), t


class Trainer:
    """One training: `step` is batch, loss, backward, step and averages."""

    def __init__(self, config: UNetConfig, form: Form, device: str, tiny: bool) -> None:
        torch.manual_seed(0)
        layout = torch.channels_last if form.channels_last else torch.contiguous_format
        # torch declares no overload of `to` with a device and a memory format, which its documentation lists.
        self.network = UNet(config).train().to(device, memory_format=layout)  # type: ignore[call-overload]
        self.module = form.compile(self.network, tiny)
        self.parameters = list(self.network.parameters())
        self.optimizer = AdamW(self.parameters, lr=recipe.LEARNING_RATE, weight_decay=recipe.WEIGHT_DECAY)
        self.averages = [EMA(self.network, profile) for profile in recipe.AVERAGES]
        self.timesteps = Timesteps(recipe.noise_path(), torch.device(device))
        self.device, self.bf16, self.steps = device, form.precision == "bf16", 0

    def step(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Train on a batch; returns the loss of each sample, float32 [B]."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            losses = self._losses(x0, eps, t)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, recipe.CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        if self.steps % recipe.EMA_EVERY == 0:
            for average in self.averages:
                average.update(self.steps, recipe.EMA_EVERY)
        return losses.detach()

    def _losses(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (scale.float() for scale in self.timesteps.scales(t))
        output = self.module(add_noise(x0, eps, alpha, sigma), t)
        error = squared_error(output, target(recipe.PREDICTION, x0, eps, alpha, sigma))
        return self.timesteps.weights(t, "plain", recipe.PREDICTION, 0.0) * error


def measure(setting: Setting, send: Send) -> None:
    images = Images(64 if setting.tiny else IMAGES, recipe.config_of(setting.tiny), setting.device)
    for form, batch in TINY_LADDER if setting.tiny else LADDER:
        case = f"{form.name}, batch {batch}"
        send(attempt(setting, PART, case, partial(_measured, setting, images, form, batch)))


def _measured(setting: Setting, images: Images, form: Form, batch: int) -> Row:
    config, case = recipe.config_of(setting.tiny), f"{form.name}, batch {batch}"
    if form.precision == "bf16" and not supports_bf16(setting.device):
        return Row(PART, case, skipped="this GPU has no bfloat16")
    set_arithmetic(tf32=form.precision == "tf32")  # as `machine.choose_kernels` in training
    trainer = Trainer(config, form, setting.device, setting.tiny)

    def step() -> None:
        trainer.step(*images.draw(batch, trainer.steps))

    first = timed(step, setting.device)
    seconds = seconds_per_call(step, setting.device, seconds_for(setting))
    found = profiled(step, setting.device, 1 if setting.tiny else recipe.EMA_EVERY)  # one of them updates the averages
    peak, source = peak_flops(form.precision, setting.device)
    return Row(
        PART,
        case,
        batch=batch,
        precision=form.precision,
        img_s=batch / seconds,
        ms=1000 * seconds,
        mfu=recipe.training_flops(config) * batch / seconds / peak,
        launches=found.launches,
        host_ms=found.host_ms,
        device_ms=found.device_ms,
        first_s=first,
        peak_gb=peak_gigabytes(setting.device),
        note="; ".join([f"peak: {source}", *([found.note] if found.note else [])]),
    )
