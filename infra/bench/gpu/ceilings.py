"""What the device can do at best: copies in its memory, and large matrix products."""

from __future__ import annotations

from functools import partial

import torch

from infra.bench.gpu.plan import Row, Send, Setting
from infra.bench.gpu.timing import attempt, peak_flops, seconds_for, seconds_per_call, supports_bf16
from models.device import set_arithmetic
from models.flops import matmul_ceiling

PART = "ceilings"
COPIED = {"cuda": 2**30, "cpu": 2**18}
"""Values in bfloat16."""


def measure(setting: Setting, send: Send) -> None:
    send(attempt(setting, PART, "copy in device memory", partial(_copy, setting)))
    for precision in ("fp32", "tf32", "bf16"):
        send(attempt(setting, PART, f"matrix product {precision}", partial(_product, setting, precision)))


def _copy(setting: Setting) -> Row:
    source = torch.randn(COPIED[setting.device], device=setting.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    seconds = seconds_per_call(lambda: target.copy_(source), setting.device, seconds_for(setting, 1.0))
    return Row(PART, "copy in device memory", ms=1000 * seconds, tb_s=2 * source.nbytes / seconds / 1e12)


def _product(setting: Setting, precision: str) -> Row:
    case = f"matrix product {precision}"
    if precision == "bf16" and not supports_bf16(setting.device):
        return Row(PART, case, skipped="this GPU has no bfloat16")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    set_arithmetic(tf32=precision == "tf32")
    reached = matmul_ceiling(torch.device(setting.device), dtype)
    peak, source = peak_flops(precision, setting.device)
    share = reached / peak if source.startswith("data sheet") else None
    return Row(PART, case, precision=precision, tflops=reached / 1e12, mfu=share, note=f"peak: {source}")
