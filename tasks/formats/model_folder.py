"""The folder `outputs/model/`: the content of one version of the registered model, and its identity.

    pipeline/         weights and schedule, diffusers layout
    onnx/             the same network as an ONNX bundle with its sampler
    measurements.json the evaluation, with guidance, fingerprint and floor of each number
    export.json       parity of the bundle with PyTorch (`ExportReport`)
    README.md         the model card

Equal files are the same version, so the folder contains nothing that differs between runs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from models.hashing import folder_sha256
from tasks.runtime import atomic, integrity
from tasks.runtime.errors import StageError

PIPELINE = "pipeline"
BUNDLE = "onnx"
MEASUREMENTS = "measurements.json"
EXPORT = "export.json"
CARD = "README.md"


@dataclass(frozen=True)
class TensorRTReport:
    """The TensorRT engine of an export: what it is and how well its images agree, or why there is none."""

    built: bool
    reason: str | None = None
    """Why no engine was built."""
    identity: str | None = None
    """Versions and GPU that the engine is valid for."""
    batches: list[int] | None = None
    """Batch sizes that the engine is optimised for: smallest, usual, largest."""
    psnr_db: dict[str, int] | None = None
    """PSNR of images against PyTorch's, by sampler."""


@dataclass(frozen=True)
class ExportReport:
    """`export.json`: how well the ONNX bundle agrees with PyTorch."""

    FORMAT: ClassVar[int] = 1

    opset: int
    max_abs_difference: float
    """Largest difference of raw network outputs."""
    abs_difference: dict[str, float]
    """The same by batch size and timestep, for the network and for its guide."""
    min_psnr_db: float
    """PSNR of the worst image drawn from the same noise."""
    psnr_db: dict[str, float]
    """The same by sampler, and with autoguidance."""
    providers: list[str]
    """Execution providers of ONNX Runtime."""
    tensorrt: TensorRTReport
    precision: str | None = None
    """"fp16" if the network of the bundle computes in float16; None is float32."""
    control: str | None = None
    """Why the bundle draws without control maps although the model has a ControlNet."""

    def write(self, file: Path) -> None:
        """Write the report with its format number; equal reports give equal bytes."""
        values = asdict(self)
        values["tensorrt"] = {name: value for name, value in values["tensorrt"].items() if value is not None}
        for absent in (name for name in ("precision", "control") if values[name] is None):
            del values[absent]
        atomic.write_json(file, {"format": self.FORMAT, **values})

    @classmethod
    def read(cls, file: Path) -> ExportReport:
        """Read a report.

        Raises:
            StageError: if the file is missing, damaged, or of another format.
        """
        values = integrity.read_json(file, "export")
        if values.pop("format", None) != cls.FORMAT:
            raise StageError(f"{file} was written by another version of this project; run 'dvc repro export'")
        return cls(**{**values, "tensorrt": TensorRTReport(**values["tensorrt"])})


def content_key(folder: Path) -> str:
    """Return the identity of a model folder: its hash."""
    return folder_sha256(folder)
