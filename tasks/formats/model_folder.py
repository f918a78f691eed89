"""The folder `outputs/model/`: what one version of the registered model consists of, and its name.

    pipeline/         weights and schedule, diffusers layout
    onnx/             the same network as an ONNX bundle with its sampler
    metrics.json      the evaluation, with fingerprint and floor
    export.json       parity of the bundle
    README.md         the model card

Equal files are the same version, so the folder holds nothing that differs from one run to the next.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

PIPELINE = "pipeline"
BUNDLE = "onnx"
METRICS = "metrics.json"
EXPORT = "export.json"
CARD = "README.md"


def content_key(folder: Path) -> str:
    """sha256 over the names and the bytes of all files of the folder, in the order of their names;
    what Python caches beside its modules does not count."""
    whole = hashlib.sha256()
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    for path in sorted(files):
        whole.update(path.relative_to(folder).as_posix().encode("utf-8") + b"\0")
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
