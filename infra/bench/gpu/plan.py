"""The parts of the benchmark, and what a part receives. Imports nothing heavy, because `--help` lists the parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

SHARES = {"ceilings": 1, "training": 8, "reference": 3, "sampling": 4, "encoding": 3, "runtimes": 4}
"""Parts in their order -> share of the time; a part that ends early leaves its time to the later ones."""
PARTS = tuple(SHARES)
NEEDS = {"reference": ("PIL",), "runtimes": ("onnx", "onnxscript", "onnxruntime", "cv2")}
"""Packages that a part needs besides those that all need."""
REFERENCE_DEFAULTS = "its defaults: fp32, batch 16"
"""Name of the case that a goal compares with."""
LEAST_SECONDS = 20.0
"""Time that must be left for another case on a GPU; one that compiles may take longer, and is then ended."""


@dataclass(frozen=True)
class Plan:
    """The command line: which parts run, on which device, for how long."""

    work: Path
    device: str = "cuda"
    """"cuda", or "cpu" for the tiny form, whose numbers are meaningless."""
    minutes: float = 10.0
    """Limit of all parts together."""
    seconds: float | None = None
    """Limit of each part; None shares `minutes` out by `SHARES`."""
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"

    def excluded(self, part: str) -> str | None:
        """Return the option that leaves a part out; None if it runs."""
        if part in self.skip:
            return "--skip"
        return "--only" if self.only and part not in self.only else None

    def seconds_of(self, part: str, left: float) -> float:
        """Return the limit of a part that begins when `left` seconds of `minutes` are left."""
        chosen = [name for name in PARTS if not self.excluded(name)]
        following = chosen[chosen.index(part) :]
        share = left * SHARES[part] / sum(SHARES[name] for name in following)
        return max(0.0, min(left, share if self.seconds is None else self.seconds))


@dataclass(frozen=True)
class Setting:
    """What a part receives."""

    device: str
    tiny: bool
    work: Path
    deadline: float
    """When the part has to end, on the clock `time.monotonic`, which all processes share."""

    def left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Row:
    """One line of the table: quantities that were not measured are None."""

    part: str
    case: str
    skipped: str | None = None
    """Why it was not measured."""
    failed: str | None = None
    """The error that ended it."""
    note: str | None = None
    batch: int | None = None
    precision: str | None = None
    """"fp32", "tf32" or "bf16"; the "fp32" of the reference has PyTorch's default, TF32 in convolutions."""
    img_s: float | None = None
    """Images per second."""
    ms: float | None = None
    """Milliseconds of a training step, a batch of images or a network evaluation."""
    mfu: float | None = None
    """Model FLOP utilisation: the network's operations per second over the peak of the device (`peaks.py`)."""
    launches: float | None = None
    """Kernels and graphs launched per step."""
    host_ms: float | None = None
    """Time of the host per step under the profiler, which adds to it."""
    device_ms: float | None = None
    """Time of the GPU's kernels per step."""
    first_s: float | None = None
    """Seconds of the first call, with compilation and the choice of kernels."""
    peak_gb: float | None = None
    """Most memory that tensors took at once, 10^9 bytes."""
    psnr_db: float | None = None
    """Peak signal-to-noise ratio to the fp32 result; None for that itself, and if both are equal."""
    tflops: float | None = None
    tb_s: float | None = None
    """Bytes read and written, 10^12 per second."""

    def to_json(self) -> dict[str, str | float]:
        """Return the fields that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


Send: TypeAlias = Callable[[Row], None]
"""Takes a finished row."""
