"""A cache of tensors in the scratch folder, keyed by the content that they are computed from.

DVC deletes a stage's outputs before the stage runs, so results that take long to compute are kept here as well. A block
is one safetensors file with the keys of its rows in its header. It is written atomically: a killed stage continues
after its last block.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from models.json_files import JsonObject, read_json
from tasks.pictures.digests import TYPE, digests, find
from tasks.runtime import atomic
from tasks.runtime.errors import StageError

RECIPE = "recipe.json"
KEPT_RECIPES = 3
"""Recipes whose blocks are kept, so that a change can be reverted without computing again."""


class Blocks:
    """Rows of tensors by key, all computed by one `recipe`, which names everything that a row depends on.

    A row takes 24 bytes of memory: the digest of its key, its file and its place in that.
    """

    def __init__(self, root: Path, recipe: JsonObject) -> None:
        canonical = json.dumps(recipe, sort_keys=True).encode("utf-8")
        self.folder = root / hashlib.sha256(canonical).hexdigest()[:16]
        self.root, self.recipe = root, recipe
        self._files: list[Path] = []
        self._digests = np.empty(0, TYPE)  # of the keys, ascending
        self._places = np.empty((0, 2), np.int32)  # of each row: number of the file, row in the file
        self._added: list[tuple[np.ndarray, np.ndarray]] = []  # rows that are not among these yet
        self._verified: set[Path] = set()
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                self._enter(file, _keys(file))
            except ValueError as error:
                print(f"{file} is damaged ({error}); its rows are computed again", flush=True)
                file.unlink()

    def changes(self) -> list[str]:
        """Return the keys of the recipe that differ from the recipe used last; empty if this recipe was used before."""
        others = sorted(self.root.glob(f"*/{RECIPE}"), key=lambda path: path.stat().st_mtime)
        if not others or (self.folder / RECIPE).exists():
            return []
        before = read_json(others[-1])
        return sorted(name for name in {*before, *self.recipe} if before.get(name) != self.recipe.get(name))

    def open(self) -> None:
        """Make this the recipe used last, and delete the blocks of all but the newest few recipes."""
        atomic.write_json(self.folder / RECIPE, self.recipe)
        others = sorted(self.root.glob(f"*/{RECIPE}"), key=lambda path: path.stat().st_mtime)
        for path in others[:-KEPT_RECIPES]:
            shutil.rmtree(path.parent)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return the distinct keys that have no row, in order."""
        distinct = list(dict.fromkeys(keys))
        return [key for key, known in zip(distinct, self.known(digests(distinct)).tolist(), strict=True) if not known]

    def known(self, wanted: np.ndarray) -> np.ndarray:
        """Return which keys have a row, bool [n], by their digests S16 [n]."""
        self._sort()
        return find(self._digests, wanted) >= 0

    def add(self, keys: Sequence[str], tensors: dict[str, torch.Tensor]) -> None:
        """Store one row of each tensor, [len(keys), ...], per key."""
        name = hashlib.sha256("\n".join(keys).encode("utf-8")).hexdigest()[:16]
        file = self.folder / f"{name}.safetensors"
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        checksums = {f"sha256 {key}": _sha256(tensor) for key, tensor in whole.items()}
        atomic.write_bytes(file, save(whole, metadata={"keys": json.dumps(list(keys)), **checksums}))
        self._verified.add(file)
        self._enter(file, keys)

    def take(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the rows of `keys`, [len(keys), ...] of each tensor.

        Raises:
            KeyError: if a key has no row.
            StageError: if a block is damaged; it is deleted.
        """
        self._sort()
        numbers = find(self._digests, digests(keys))
        if (numbers < 0).any():
            raise KeyError(keys[int(np.argmin(numbers))])
        files, row_of = self._places[numbers].T
        taken: dict[str, torch.Tensor] = {}
        for number in np.unique(files):
            file, places = self._files[number], np.flatnonzero(files == number)
            rows = torch.from_numpy(row_of[places])
            with safe_open(file, "pt") as block:
                for name in block.keys():  # noqa: SIM118 - not a mapping
                    tensor = block.get_tensor(name)
                    if file not in self._verified and _sha256(tensor) != block.metadata()[f"sha256 {name}"]:
                        file.unlink()
                        raise StageError(f"{file} was damaged and is removed; run the same command again")
                    if name not in taken:
                        taken[name] = torch.empty(len(keys), *tensor.shape[1:], dtype=tensor.dtype)
                    taken[name][torch.from_numpy(places)] = tensor[rows]
            self._verified.add(file)
        return taken

    def forget(self, wanted: np.ndarray) -> None:
        """Delete the blocks that hold no row of the keys whose digests, S16 [n], are `wanted`."""
        self._sort()
        numbers = find(self._digests, wanted)
        used = np.zeros(len(self._files), np.bool_)
        used[self._places[numbers[numbers >= 0], 0]] = True
        for number in np.setdiff1d(self._places[:, 0], np.flatnonzero(used)):
            self._files[number].unlink()
        kept = used[self._places[:, 0]]
        self._digests, self._places = self._digests[kept], self._places[kept]

    def _enter(self, file: Path, keys: Sequence[str]) -> None:
        places = np.stack([np.full(len(keys), len(self._files)), np.arange(len(keys))], axis=1)
        self._files.append(file)
        self._added.append((digests(keys), places.astype(np.int32)))

    def _sort(self) -> None:
        """Order all rows by their digests; of rows with the same key, the one that was entered last counts."""
        if not self._added:
            return
        entered, places = zip(*self._added, strict=True)
        every, place_of = np.concatenate([self._digests, *entered]), np.concatenate([self._places, *places])
        order = np.argsort(every, kind="stable")
        every = every[order]
        last = np.ones(len(every), np.bool_)
        last[:-1] = every[1:] != every[:-1]
        self._digests, self._places, self._added = every[last], place_of[order][last], []


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.view(torch.uint8).numpy().data).hexdigest()


def _keys(file: Path) -> list[str]:
    """Read the keys of a block's rows.

    Raises:
        ValueError: if the file is damaged or not a block.
    """
    try:
        with safe_open(file, "pt") as block:
            keys: list[str] = json.loads(block.metadata()["keys"])
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from None
    return keys
