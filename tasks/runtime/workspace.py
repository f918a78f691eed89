"""Where things live that belong to the work tree and not to one run of a stage."""

from __future__ import annotations

import os
from pathlib import Path


def root() -> Path:
    """The main work tree, absolute; also from inside a `dvc exp run --temp` copy of it."""
    here = Path.cwd().resolve()
    parts = here.parts
    for index in range(len(parts) - 2):
        if parts[index : index + 3] == (".dvc", "tmp", "exps"):
            return Path(*parts[:index])
    return here


def scratch() -> Path:
    """Folder of checkpoints and locks; `AFTERIMAGE_SCRATCH` overrides it."""
    return Path(os.environ.get("AFTERIMAGE_SCRATCH") or root() / ".scratch").resolve()


def tracking_uri() -> str:
    """Address of MLflow; `MLFLOW_TRACKING_URI` overrides the SQLite file in the work tree."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root() / 'mlflow.db'}"
