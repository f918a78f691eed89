"""What `codec` measured on held-out images, for the report, MLflow and the log."""

from __future__ import annotations

from pathlib import Path

from models.json_files import read_json

QUALITY, RECONSTRUCTIONS = FILES = "quality.json", "reconstructions.png"
"""Files of `outputs/codec` that `train` copies to `codec/` in its report."""


def of_codec(folder: Path) -> dict[str, float]:
    """Return the held-out quality of the autoencoder and the text encoder as MLflow metrics; empty without them."""
    file = folder / QUALITY
    quality = read_json(file) if file.is_file() else {}
    return {f"codec/{name}": value for name, value in quality.items()}
