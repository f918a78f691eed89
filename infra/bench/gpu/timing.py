"""Time, memory and launches of a repeated call, and the frame that every case runs in."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from infra.bench.gpu.peaks import Arithmetic, peak_of
from infra.bench.gpu.plan import LEAST_SECONDS, Row, Setting
from models.flops import matmul_ceiling

if TYPE_CHECKING:
    from torch.autograd.profiler_util import FunctionEvent

ROUNDS = 3
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
CALL = "bench: call"
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")


def attempt(setting: Setting, part: str, case: str, measure: Callable[[], Row]) -> Row:
    """Measure one case; an error or a lack of time or packages is a row as well, and the next case goes on."""
    if setting.left() < (0 if setting.tiny else LEAST_SECONDS):
        return Row(part, case, skipped="no time is left; raise --seconds or --minutes")
    try:
        return measure()
    except ModuleNotFoundError as error:
        return Row(part, case, skipped=f"package {error.name} is not installed")
    except torch.OutOfMemoryError:
        return Row(part, case, failed="out of memory")
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        return Row(part, case, failed=f"{type(error).__name__}: {first[:200]}")
    finally:
        if setting.device == "cuda":  # free the memory of this case, and forget how much it was
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], object], device: str) -> float:
    """Return the seconds of one call, with all work of the GPU."""
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def seconds_per_call(call: Callable[[], object], device: str, seconds: float) -> float:
    """Return the median over `ROUNDS` rounds of consecutive calls, which together take about `seconds`.

    The GPU is waited for at the ends of a round only, as in a training. Zero seconds are a single call.
    """
    once = timed(call, device)
    if not seconds:
        return once
    once = min(once, timed(call, device))
    calls = max(1, min(200, round(seconds / ROUNDS / max(once, 1e-6))))

    def calls_in_a_row() -> None:
        for _ in range(calls):
            call()

    return median(timed(calls_in_a_row, device) / calls for _ in range(ROUNDS))


def seconds_for(setting: Setting, most: float = 4.0) -> float:
    """Return how long one case is to be measured: `most`, less if the part has little time left."""
    return 0.0 if setting.tiny else max(0.5, min(most, setting.left() / 8))


def peak_gigabytes(device: str) -> float | None:
    """Return the most memory of tensors since the last case, in 10^9 bytes; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None


@dataclass(frozen=True)
class Profiled:
    """Per call; `launches` and `device_ms` are None on a CPU, and where CUPTI, which records them, is missing."""

    launches: float | None = None
    host_ms: float | None = None
    device_ms: float | None = None
    note: str | None = None


def profiled(call: Callable[[], object], device: str, calls: int = 3) -> Profiled:
    """Count launches and the time of host and GPU by torch.profiler.

    The time of the host is that until a call returns, without waiting for the GPU: synchronisations do not count, and a
    launch, which waits while the GPU's queue is full, counts with the median of all.
    """
    gpu = device == "cuda"
    try:
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as found:
            for _ in range(calls):
                with record_function(CALL):
                    call()
            synchronize(device)
        events = found.events() or []
    except RuntimeError as error:
        return Profiled(note=f"torch.profiler: {str(error).splitlines()[0][:120]}")
    host = [event for event in events if event.device_type.name == "CPU"]
    launches = [event.cpu_time_total for event in host if event.name in LAUNCHES]
    waiting = sum(event.cpu_time_total for event in host if event.name in WAITS and _inside_a_call(event))
    waiting += sum(launches) - median(launches) * len(launches) if launches else 0.0
    host_us = sum(event.cpu_time_total for event in host if event.name == CALL) - waiting
    kernels = [event for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation]
    device_us = sum(event.self_device_time_total for event in kernels)
    return Profiled(
        launches=len(launches) / calls if launches else None,
        host_ms=host_us / calls / 1000,
        device_ms=device_us / calls / 1000 if kernels else None,
        note="launches are not counted: torch.profiler found no CUPTI" if gpu and not launches else None,
    )


def _inside_a_call(event: FunctionEvent) -> bool:
    """Whether an event happened during one of the calls, and not after them."""
    parent = event.cpu_parent
    while parent is not None and parent.name != CALL:
        parent = parent.cpu_parent
    return parent is not None


def arithmetic_of(precision: str, device: str) -> Arithmetic:
    """Return what the convolutions of a precision are computed in, in fp32 by the setting and the device."""
    if precision == "bf16":
        return "bf16"
    new = device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    return "tf32" if new and torch.backends.cudnn.allow_tf32 else "fp32"


def peak_flops(precision: str, device: str) -> tuple[float, str]:
    """Return the peak operations per second of a precision, and where the number is from."""
    arithmetic = arithmetic_of(precision, device)
    listed = peak_of(torch.cuda.get_device_name()) if device == "cuda" else None
    value = listed.of(arithmetic) if listed else None
    if value:
        return value * 1e12, f"data sheet, {arithmetic}"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = arithmetic == "tf32"  # by default PyTorch has TF32 in convolutions alone
    try:
        return matmul_ceiling(torch.device(device), dtype), f"measured matrix product, {arithmetic}"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def supports_bf16(device: str) -> bool:
    return device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)


def psnr(result: Tensor, reference: Tensor, peak: float) -> float | None:
    """Return the peak signal-to-noise ratio, dB; None if both are equal.

    Raises:
        ValueError: if a value of `result` is not finite.
    """
    error = float((result.double() - reference.double()).square().mean())
    if not math.isfinite(error):
        raise ValueError("the result has values that are not finite")
    return 10 * math.log10(peak**2 / error) if error else None
