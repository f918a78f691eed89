"""Encoding images by an autoencoder of Stable Diffusion's architecture in four forms, as the stage `encode` does."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.utils import logging

from infra.bench.gpu.plan import Row, Send, Setting
from infra.bench.gpu.timing import attempt, peak_gigabytes, psnr, seconds_for, seconds_per_call, supports_bf16, timed
from infra.bench.gpu.training import COMPILED, FP32, NHWC, Form
from models.device import set_arithmetic
from models.networks.autoencoder import encode

PART = "encoding"
FORMS = (FP32, Form("bf16"), NHWC, COMPILED)
WIDTHS, SIDE, COUNT = (128, 256, 512, 512), 512, 32
TINY_WIDTHS, TINY_SIDE, TINY_COUNT = (4,), 8, 2


class Encoder:
    """The autoencoder with random weights, and images, uint8 [N, 3, S, S]."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        side, count = (TINY_SIDE, TINY_COUNT) if setting.tiny else (SIDE, COUNT)
        self.pixels = np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8)
        self.reference: torch.Tensor | None = None
        """Latents of the fp32 form."""

    def network(self, form: Form) -> AutoencoderKL:
        """Build the network in a form; the weights are the same in all."""
        tiny = self.setting.tiny
        widths = TINY_WIDTHS if tiny else WIDTHS
        torch.manual_seed(0)
        network = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=1 if tiny else 2,
            norm_num_groups=2 if tiny else 32,
        )
        dtype = torch.bfloat16 if form.precision == "bf16" else torch.float32
        layout = torch.channels_last if form.channels_last else torch.contiguous_format
        network = network.eval().requires_grad_(False).to(self.setting.device, dtype).to(memory_format=layout)
        network.encoder = form.compile(network.encoder, tiny)
        return network

    def measured(self, form: Form) -> Row:
        """Time the encoding of all images."""
        setting, network = self.setting, self.network(form)
        held: list[torch.Tensor] = []
        first = timed(lambda: held.append(encode(network, self.pixels)[0]), setting.device)
        means = held[0]
        self.reference = means if self.reference is None else self.reference
        peak = float(self.reference.max() - self.reference.min())
        seconds = seconds_per_call(lambda: encode(network, self.pixels), setting.device, seconds_for(setting))
        return Row(
            PART,
            form.name,
            batch=len(self.pixels),
            precision=form.precision,
            img_s=len(self.pixels) / seconds,
            ms=1000 * seconds,
            first_s=first,
            peak_gb=peak_gigabytes(setting.device),
            psnr_db=psnr(means, self.reference, peak),
        )


def measure(setting: Setting, send: Send) -> None:
    set_arithmetic()
    logging.set_verbosity_error()  # it warns of casts that the forms are about
    encoder = Encoder(setting)
    for form in FORMS:
        if form.precision == "bf16" and not supports_bf16(setting.device):
            send(Row(PART, form.name, skipped="this GPU has no bfloat16"))
        else:
            send(attempt(setting, PART, form.name, partial(encoder.measured, form)))
