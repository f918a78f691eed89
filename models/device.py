"""The device of everything except the diffusion training, whose device accelerate selects, and its arithmetic."""

from __future__ import annotations

import torch


def best_device() -> str:
    """Return "cuda" if PyTorch can use an NVIDIA GPU, else "cpu"; on a GPU, set its arithmetic, see `set_arithmetic`.

    Apple's MPS is not used: it has no float64.
    """
    if not torch.cuda.is_available():
        return "cpu"
    set_arithmetic()
    return "cuda"


def set_arithmetic() -> None:
    """Compute float32 in full, and search the fastest convolution of each shape once.

    PyTorch's own setting is TF32 in convolutions, with 10 bits of mantissa, and full float32 in matrix products. Here
    float32 means float32, as in ONNX Runtime on the other side of a comparison, and what should be faster says so by
    its precision (`evaluate.precision`). Shapes repeat, so the search of cuDNN pays.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True


def emulates_bf16(device: str) -> bool:
    """Return whether bfloat16 is computed in software: on a CPU without instructions for it.

    A convolution can then take 60 times as long as in float32.
    """
    native = (name for name, present in torch.cpu.get_capabilities().items() if "bf16" in name and present)
    return device == "cpu" and not any(native)
