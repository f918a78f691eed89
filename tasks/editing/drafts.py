"""Edited images that are kept in the scratch folder until the stage ends, so that a killed run continues."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.runtime import atomic, closure, workspace


@dataclass(frozen=True)
class Drafts:
    """A folder with one file for each set of images, named by everything that determines them."""

    folder: Path

    @classmethod
    def of(cls, *determining: object) -> Drafts:
        """Return the drafts of these inputs and of the present code."""
        identity = json.dumps([*determining, closure.digest("tasks/edit.py")], sort_keys=True)
        return cls(workspace.scratch() / "edit" / hashlib.sha256(identity.encode()).hexdigest()[:16])

    def get(self, name: str, draw: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the images that were kept under this name, or draw and keep them."""
        file = self.folder / f"{name}.npy"
        if file.exists():
            kept: np.ndarray = np.load(file, allow_pickle=False)
            return kept
        drawn, buffer = draw(), io.BytesIO()
        np.save(buffer, drawn, allow_pickle=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(file, buffer.getvalue())
        return drawn

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
