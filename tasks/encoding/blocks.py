"""Tensors found again by the content they were made of, in files of the scratch folder.

DVC empties a stage's outputs before the stage runs; what took long to compute lies here and is taken from here. A
block is one safetensors file with the keys of its rows in its header, so it is there whole or not at all, and a
killed stage goes on after its last block.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.runtime import atomic
from tasks.runtime.stage import StageError

if TYPE_CHECKING:
    import torch

RECIPE = "recipe.json"
KEPT_RECIPES = 3


class Blocks:
    """Rows of tensors by key, all made by one `recipe`: whatever changes a row for the same key is named in it."""

    def __init__(self, root: Path, recipe: dict[str, Any]) -> None:
        canonical = json.dumps(recipe, sort_keys=True).encode("utf-8")
        self.folder = root / hashlib.sha256(canonical).hexdigest()[:16]
        self.root, self.recipe = root, recipe
        self.rows: dict[str, tuple[Path, int]] = {}
        self._sound: set[Path] = set()
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                self._enter(file, _keys(file))
            except ValueError as error:
                print(f"{file} is damaged ({error}); what it held is computed again", flush=True)
                file.unlink()

    def changes(self) -> list[str]:
        """Parts of the recipe that differ from the one used last, where that was another one; else nothing."""
        others = sorted(self.root.glob(f"*/{RECIPE}"), key=lambda path: path.stat().st_mtime)
        if not others or (self.folder / RECIPE).exists():
            return []
        before = json.loads(others[-1].read_text(encoding="utf-8"))
        return sorted(name for name in {*before, *self.recipe} if before.get(name) != self.recipe.get(name))

    def open(self) -> None:
        """Make this the recipe used last, and forget all but the newest few."""
        atomic.write_json(self.folder / RECIPE, self.recipe)
        others = sorted(self.root.glob(f"*/{RECIPE}"), key=lambda path: path.stat().st_mtime)
        for path in others[:-KEPT_RECIPES]:
            shutil.rmtree(path.parent)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that have no row, each once, in their order."""
        return [key for key in dict.fromkeys(keys) if key not in self.rows]

    def add(self, keys: Sequence[str], tensors: dict[str, torch.Tensor]) -> None:
        """Keep one row of each of `tensors`, [len(keys), ...], for each key."""
        from safetensors.torch import save

        name = hashlib.sha256("\n".join(keys).encode("utf-8")).hexdigest()[:16]
        file = self.folder / f"{name}.safetensors"
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        described = {"keys": json.dumps(list(keys)), **{f"sha256 {key}": _sha256(its) for key, its in whole.items()}}
        atomic.write_bytes(file, save(whole, metadata=described))
        self._sound.add(file)
        self._enter(file, keys)

    def take(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """The rows of `keys`, [len(keys), ...] of each tensor. Raises `KeyError` where one is missing,
        `StageError` where its block is damaged."""
        import torch
        from safetensors import safe_open

        wanted: dict[Path, list[tuple[int, int]]] = {}
        for place, key in enumerate(keys):
            file, row = self.rows[key]
            wanted.setdefault(file, []).append((place, row))
        taken: dict[str, torch.Tensor] = {}
        for file, pairs in wanted.items():
            places, rows = (torch.tensor(column) for column in zip(*pairs, strict=True))
            with safe_open(file, "pt") as block:
                for name in block.keys():  # noqa: SIM118 - it is no mapping
                    tensor = block.get_tensor(name)
                    if file not in self._sound and _sha256(tensor) != block.metadata()[f"sha256 {name}"]:
                        file.unlink()
                        raise StageError(f"{file} was damaged and is removed; run the same command again")
                    if name not in taken:
                        taken[name] = torch.empty(len(keys), *tensor.shape[1:], dtype=tensor.dtype)
                    taken[name][places] = tensor[rows]
            self._sound.add(file)
        return taken

    def forget(self, keys: Iterable[str]) -> None:
        """Delete blocks none of whose rows is among `keys`."""
        used = {self.rows[key][0] for key in keys if key in self.rows}
        for file in {file for file, _ in self.rows.values()} - used:
            file.unlink()
        self.rows = {key: row for key, row in self.rows.items() if row[0] in used}

    def _enter(self, file: Path, keys: Sequence[str]) -> None:
        self.rows.update({key: (file, row) for row, key in enumerate(keys)})


def _sha256(tensor: torch.Tensor) -> str:
    import torch

    return hashlib.sha256(tensor.view(torch.uint8).numpy().data).hexdigest()


def _keys(file: Path) -> list[str]:
    """Keys of a block's rows. Raises `ValueError` where it is no whole file of that kind."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as block:
            keys: list[str] = json.loads(block.metadata()["keys"])
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from None
    return keys
