"""The devices of everything except the diffusion training, whose device accelerate selects, and their arithmetic.

Also here: what makes a process faster that computes on the CPU.
"""

from __future__ import annotations

import copy
import ctypes
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound="nn.Module | None")

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # <malloc.h>
TOP_PAD_BYTES = 64 * 2**20


def best_device() -> str:
    """Return "cuda" if PyTorch can use an NVIDIA GPU, else "cpu"; on a GPU, set its arithmetic, see `set_arithmetic`.

    Apple's MPS is not used: it has no float64.
    """
    if not torch.cuda.is_available():
        return "cpu"
    set_arithmetic()
    return "cuda"


def devices_of(device: str) -> tuple[str, ...]:
    """Return the devices that work for `device`: for "cuda" every GPU of the machine, for other names that one alone.

    GPUs of another model than the first one are left out, because their results may differ in the last bits.
    `CUDA_VISIBLE_DEVICES` restricts the choice.
    """
    if device != "cuda" or torch.cuda.device_count() < 2:
        return (device,)
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return tuple(f"cuda:{number}" for number, name in enumerate(names) if name == names[0])


def memory_of(device: str) -> int:
    """Return the memory of a GPU in bytes."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def enter(device: str) -> None:
    """Make a numbered GPU the current one of this thread; nothing for "cuda", the current one, and other devices."""
    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index is not None:  # `set_device` refuses a GPU without a number
        torch.cuda.set_device(chosen)


def placed(network: Module, device: str) -> Module:
    """Return `network` if it is on `device`, else a copy of it there, to evaluate and not to train; None stays None."""
    target = torch.empty(0, device=device).device  # "cuda" is a certain GPU here
    if network is None or all(weights.device == target for weights in network.state_dict().values()):
        return network
    copies: dict[int, object] = {}
    for parameter in network.parameters():
        copies[id(parameter)] = nn.Parameter(parameter.detach().to(target), requires_grad=False)
    for buffer in network.buffers():
        copies[id(buffer)] = buffer.to(target)
    return copy.deepcopy(network, copies)


def sent(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """Copy a tensor of the CPU to a device; from pinned memory, so that the host does not wait for a GPU."""
    on_gpu = torch.device(device).type == "cuda"
    return (tensor.pin_memory() if on_gpu else tensor).to(device, non_blocking=True)


def set_arithmetic(tf32: bool = False, search: bool = True) -> None:
    """Set what a GPU of this process computes float32 in, and how cuDNN chooses its convolutions.

    PyTorch's own setting is TF32 in convolutions, with 10 bits of mantissa, and full float32 in matrix products. Here
    float32 means float32 in both, as in ONNX Runtime on the other side of a comparison, and what should be faster says
    so by its precision (`evaluate.precision`, `train.precision`). Autocast in bfloat16 or float16 depends on neither.

    Args:
        tf32: compute convolutions and matrix products of float32 in TF32, on GPUs that have it (`train.precision`
            'tf32').
        search: search the fastest convolution of each shape once, which pays where shapes repeat. The choice may differ
            between two runs.
    """
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = search


def emulates_bf16(device: str) -> bool:
    """Return whether bfloat16 is computed in software: on a CPU without instructions for it.

    A convolution can then take 60 times as long as in float32.
    """
    native = (name for name, present in torch.cpu.get_capabilities().items() if "bf16" in name and present)
    return device == "cpu" and not any(native)


def warn_of_emulation(name: str, precision: str, device: str) -> None:
    """Print a warning if `precision`, the parameter or option `name`, is bfloat16 and `device` computes it in software.

    The results are those of the hardware's bfloat16.
    """
    if precision == "bf16" and emulates_bf16(device):
        print(f"{name}: this CPU emulates bfloat16, which is slow; 'no' (float32) is faster", flush=True)


def keep_freed(device: str) -> None:
    """Make glibc keep freed memory for the next allocation, if the process computes on the CPU; idempotent.

    PyTorch caches no memory on a CPU. The activations of each step would be mapped, zeroed page by page and unmapped
    again: thousands of page faults, a tenth of the time of a training step and about as much of a sampling step. The
    process keeps its peak memory. Without glibc this does nothing.
    """
    if device != "cpu":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    mallopt(MMAP_MAX, 0)
    mallopt(TRIM_THRESHOLD, -1)
    mallopt(TOP_PAD, TOP_PAD_BYTES)
