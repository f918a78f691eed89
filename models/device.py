"""The device of everything except the diffusion training, whose device accelerate selects."""

from __future__ import annotations

import torch


def best_device() -> str:
    """Return "cuda" if PyTorch can use an NVIDIA GPU, else "cpu".

    Apple's MPS is not used: it has no float64.
    """
    return "cuda" if torch.cuda.is_available() else "cpu"
