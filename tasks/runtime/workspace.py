"""Places of the work tree: its root, the scratch folder, and the addresses of MLflow and of the webhook."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from tasks.runtime.errors import StageError

WEBHOOK = "AFTERIMAGE_WEBHOOK_URL"
"""Variable with the address that gets notifications."""


def root() -> Path:
    """Return the absolute path of the work tree; inside a copy of `dvc exp run --temp`, that of the original."""
    here = Path.cwd().resolve()
    parts = here.parts
    for index in range(len(parts) - 2):
        if parts[index : index + 3] == (".dvc", "tmp", "exps"):
            return Path(*parts[:index])
    return here


def scratch() -> Path:
    """Return the folder of checkpoints and locks; `AFTERIMAGE_SCRATCH` overrides it."""
    return Path(os.environ.get("AFTERIMAGE_SCRATCH") or root() / ".scratch").resolve()


def scratch_file() -> IO[bytes]:
    """Open a new file without a name in the scratch folder; it is deleted when it is closed."""
    folder = scratch()
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=folder)


def tracking_uri() -> str:
    """Return the address of MLflow; `MLFLOW_TRACKING_URI` overrides the SQLite file in the work tree."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root() / 'mlflow.db'}"


def webhook() -> str | None:
    """Return the address that gets notifications; None if there is none.

    Raises:
        StageError: if it is no address of the web.
    """
    found = os.environ.get(WEBHOOK, "").strip()
    parts = urlsplit(found)
    if found and (parts.scheme not in ("http", "https") or not parts.hostname):
        raise StageError(f"{WEBHOOK} must be an address that starts with http:// or https://; correct or unset it")
    return found or None
