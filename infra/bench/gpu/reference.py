"""The loop that diffusers documents for unconditional training, with the same network, at defaults and in bf16.

Its arithmetic is PyTorch's default, with TF32 in convolutions of float32, because the reference sets no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from infra.bench.gpu import recipe
from infra.bench.gpu.plan import REFERENCE_DEFAULTS, Row, Send, Setting
from infra.bench.gpu.timing import (
    attempt,
    peak_flops,
    peak_gigabytes,
    seconds_for,
    seconds_per_call,
    supports_bf16,
    timed,
)
from infra.bench.peer import DEFAULT_BATCH, Peer, PeerSettings

PART = "reference"
FILES = 4096


@dataclass(frozen=True)
class Case:
    """`resident`: batches lie ready on the device, so that the loop is measured without its loader."""

    name: str
    precision: str
    batch: int
    resident: bool = False


CASES = (
    Case(REFERENCE_DEFAULTS, "fp32", DEFAULT_BATCH),
    Case("bf16, batch 128", "bf16", 128),
    Case("bf16, batch 512, images on the device", "bf16", 512, resident=True),
    Case("bf16, batch 128, images on the device", "bf16", 128, resident=True),
    Case("fp32, batch 128", "fp32", 128),
)


def measure(setting: Setting, send: Send) -> None:
    files = setting.work / "files"
    write_images(files, 32 if setting.tiny else FILES, recipe.config_of(setting.tiny).size)
    for case in CASES:
        send(attempt(setting, PART, case.name, partial(_measured, setting, files, case)))


def write_images(folder: Path, count: int, size: int) -> None:
    """Write the random images as PNG files, which the reference reads; those that exist are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(recipe.random_images(count, size).permute(0, 2, 3, 1).numpy()):
        file = folder / f"{size}-{number:05d}.png"
        if not file.exists():
            Image.fromarray(pixels).save(file)


def _measured(setting: Setting, files: Path, case: Case) -> Row:
    if case.precision == "bf16" and not supports_bf16(setting.device):
        return Row(PART, case.name, skipped="this GPU has no bfloat16")
    config, batch = recipe.config_of(setting.tiny), 4 if setting.tiny else case.batch
    precision = "no" if case.precision == "fp32" else case.precision
    peer = Peer(PeerSettings(config, batch, precision, flip=recipe.FLIP), files)
    if case.resident:
        images = torch.randn(batch, config.channels, config.size, config.size, device=setting.device)
        peer.batches = iter(lambda: images, None)
    first = timed(lambda: peer.advance(1), setting.device)
    # Waiting for the GPU after each step costs nothing here: the loop itself reads every loss.
    seconds = seconds_per_call(lambda: peer.advance(1), setting.device, seconds_for(setting))
    peak, source = peak_flops(case.precision, setting.device)
    return Row(
        PART,
        case.name,
        batch=batch,
        precision=case.precision,
        img_s=batch / seconds,
        ms=1000 * seconds,
        mfu=recipe.training_flops(config) * batch / seconds / peak,
        first_s=first,
        peak_gb=peak_gigabytes(setting.device),
        note=f"peak: {source}" + ("" if peer.with_accelerate else "; accelerate is not installed"),
    )
