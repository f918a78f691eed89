"""Speed, utilisation and memory of a training run, for the progress bar and MLflow."""

from __future__ import annotations

import resource
import sys
import time
from typing import TYPE_CHECKING

import torch

from models import flops
from models.networks import compilation

if TYPE_CHECKING:
    from tasks.training.run import Run

DTYPES = {"no": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKWARD_FACTOR = 3
"""Operations of a training step per operation of its forward pass."""


class Meter:
    """Measures from `start` to `read`."""

    def __init__(self, run: Run) -> None:
        self.device = run.accelerator.device
        peak = flops.matmul_ceiling(self.device, DTYPES[run.params.precision])
        self.peak_flops = peak * run.accelerator.num_processes
        sample = run.held_out[0].split(1)[0]
        with compilation.without(run.network):
            self.flops = BACKWARD_FACTOR * flops.forward_flops(run.network, sample.x0, sample.t, *sample.conditions)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # without the matrices that measured the peak
        self.start()

    def start(self) -> None:
        """Begin a measurement."""
        self._since, self._images = time.perf_counter(), 0

    def count(self, images: int) -> None:
        """Add the images of a step."""
        self._images += images

    def read(self) -> dict[str, float]:
        """Return images per second, the share of the device's measured matmul speed, and the peak memory in MB."""
        rate = self._images / (time.perf_counter() - self._since)
        return {
            "img_per_s": rate,
            "model_flops_utilisation": rate * self.flops / self.peak_flops,
            "peak_memory_mb": self._peak_bytes() / 1e6,
        }

    def _peak_bytes(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest * (1 if sys.platform == "darwin" else 1024)
