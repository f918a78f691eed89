"""The form of the model's inputs: safetensors shards per split, and an index.

    data/latents/train-00000.safetensors   pixels uint8 [n, C, H, W], or mean and std bfloat16 [n, V, k, h, w];
                                           labels int64 [n], or captions int32 [n, K]: rows of the texts, -1 after them
    data/latents/texts-00000.safetensors   embeddings bfloat16 [n, L, D] of the distinct captions, in alphabetical order
    data/latents/prompts.safetensors       embeddings bfloat16 [classes + 1, L, D]: class prompts, then the empty text
    data/latents/index.json                counts, shards, buckets, codec, conditioning, scaling, digest

With two text encoders L is one more, and `sizes` int32 [n, 6] stand beside the captions: see
`models/networks/text_encoder.py`.

A shard holds inputs of one bucket (`tasks/formats/buckets.py`), which is the square where there are no others.
Under the identity codec the inputs are the pixels themselves; under an autoencoder the mean and standard deviation of
its posterior, from which training draws, V = 2 with a mirrored copy. They are in the model's units: nothing is to be
scaled any more. Labels and captions are there where the conditioning needs them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.formats.buckets import SQUARE
from tasks.runtime import atomic
from tasks.runtime.stage import StageError
from tasks.sources.entry import sha256_of

if TYPE_CHECKING:
    import numpy as np
    import torch

    from tasks.formats.buckets import Form

FORMAT = 3
PROMPTS = "prompts.safetensors"
BFLOAT16 = "int16"
"""How a shard's bfloat16 is mapped."""


@dataclass(frozen=True)
class Latents:
    """One bucket of a split of the model's inputs, sorted by key: pixels, or mean and std."""

    classes: int
    """Number of classes, which is also the label that stands for "no condition"; 0 without labels."""
    keys_sha256: str
    """Hash of the keys of the split's images, in order."""
    pixels: np.ndarray | None = None
    """uint8 [N, C, H, W]"""
    mean: torch.Tensor | None = None
    """bfloat16 [N, V, k, h, w]: of the image, and where V is 2 of its mirror image"""
    std: torch.Tensor | None = None
    labels: np.ndarray | None = None
    """int64 [N], 0 to the number of classes - 1"""
    captions: np.ndarray | None = None
    """int32 [N, K]: rows of `texts`; who has fewer than K captions has -1 after them"""
    texts: torch.Tensor | None = None
    """bfloat16 [U, L, D]: every caption once"""
    prompts: torch.Tensor | None = None
    """bfloat16 [classes + 1, L, D]: what asks for each class, and the empty text that stands for no condition"""

    @property
    def count(self) -> int:
        inputs = self.mean if self.pixels is None else self.pixels
        return 0 if inputs is None else len(inputs)


def keys_hash(keys: list[str]) -> str:
    """sha256 of keys in their order."""
    return hashlib.sha256("\n".join(keys).encode("utf-8")).hexdigest()


def write_shards(
    folder: Path, name: str, count: int, rows: Callable[[slice], dict[str, Any]], shard_size: int
) -> list[dict[str, str]]:
    """Write `count` rows as shards of `folder` (a temporary one); returns their entries for the index.

    `rows(part)` gives the tensors, or NumPy arrays, of those rows; only one shard of them is in memory.
    """
    import torch
    from safetensors.torch import save

    shards = []
    for number, start in enumerate(range(0, count, shard_size)):
        file = folder / f"{name}-{number:05d}.safetensors"
        part = rows(slice(start, min(start + shard_size, count)))
        tensors = {key: torch.as_tensor(value).contiguous() for key, value in part.items() if value is not None}
        file.write_bytes(save(tensors))  # an ordinary write: a full disk is an OSError as everywhere
        shards.append({"file": file.name, "sha256": sha256_of(file)})
    return shards


def write_prompts(folder: Path, embeddings: torch.Tensor) -> str:
    """Write the embeddings of the class prompts and the empty text; returns the sha256 of the file."""
    from safetensors.torch import save

    (folder / PROMPTS).write_bytes(save({"embeddings": embeddings.contiguous()}))
    return sha256_of(folder / PROMPTS)


def write_index(
    folder: Path,
    codec: dict[str, Any],
    splits: dict[str, Any],
    buckets: Sequence[Form],
    texts: list[dict[str, str]] | None = None,
    prompts_sha256: str | None = None,
) -> None:
    """Write `index.json` last; its digest covers codec and content. `channels` and `size` are those of square inputs,
    `buckets` the forms of all."""
    latent = codec.get("autoencoder")
    index = {
        "format": FORMAT,
        "codec": codec["kind"],
        "conditioning": codec["conditioning"],
        "channels": latent["channels"] if latent else codec["channels"],
        "size": latent["size"] if latent else codec["size"],
        "image": {"channels": codec["channels"], "size": codec["size"]},
        "autoencoder": latent,
        "classes": codec["classes"],
        "text": codec.get("text"),
        "prompts": codec.get("prompts"),
        "buckets": buckets,
        "splits": splits,
        "texts": texts,
        "prompts_sha256": prompts_sha256,
    }
    canonical = json.dumps(index, sort_keys=True).encode("utf-8")
    atomic.write_json(folder / "index.json", index | {"digest": hashlib.sha256(canonical).hexdigest()})


def read_index(path: Path) -> dict[str, Any]:
    """`index.json`: format, codec, conditioning, channels, size, image, autoencoder, classes, text, prompts, buckets,
    splits {name: count, keys_sha256, shards}, texts, digest. Raises `StageError` where it is missing or of another
    format."""
    try:
        index: dict[str, Any] = json.loads((path / "index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path} holds no index.json; run 'dvc repro encode'") from None
    if index.get("format") != FORMAT:
        raise StageError(f"{path} has format {index.get('format')}, not {FORMAT}; run 'dvc repro -f encode'")
    return index


def load_latents(path: Path, split: str, bucket: int = SQUARE) -> Latents:
    """One bucket of a split of the model's inputs, read into memory. Raises `StageError` where there is none."""
    import numpy as np

    index = read_index(path)
    parts, texts = open_shards(path, split, bucket), open_texts(path)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Latents(
        pixels=columns.get("pixels"),
        mean=as_tensor(columns["mean"]) if "mean" in columns else None,
        std=as_tensor(columns["std"]) if "std" in columns else None,
        labels=columns.get("labels"),
        captions=columns.get("captions"),
        texts=as_tensor(np.concatenate([part["embeddings"] for part in texts])) if texts else None,
        prompts=load_prompts(path),
        classes=len(index["classes"]),
        keys_sha256=index["splits"][split]["keys_sha256"],
    )


def load_prompts(path: Path) -> torch.Tensor | None:
    """Embeddings bfloat16 [classes + 1, L, D] of what asks for each class, and of no condition; None without text."""
    return as_tensor(_mapped(path / PROMPTS)["embeddings"]) if read_index(path)["prompts_sha256"] else None


def open_texts(path: Path) -> list[dict[str, np.ndarray]]:
    """`embeddings` of the captions, to whose rows `captions` points, memory-mapped by shard; empty without text."""
    return [_mapped(path / shard["file"]) for shard in read_index(path)["texts"] or []]


def buckets_of(path: Path, split: str) -> list[int]:
    """Numbers of the buckets in which a split has images. Raises `StageError` where there is no such split."""
    return sorted({shard["bucket"] for shard in _shards(path, split)})


def open_shards(path: Path, split: str, bucket: int = SQUARE) -> list[dict[str, np.ndarray]]:
    """The tensors of each shard of a bucket of a split, memory-mapped: what is not indexed is not read. `as_tensor`
    makes torch's of their rows.

    Raises `StageError` where there is no such split, or nothing in that bucket.
    """
    shards = [shard for shard in _shards(path, split) if shard["bucket"] == bucket]
    if not shards:
        raise StageError(f"split '{split}' of {path} has no image in bucket {bucket}; see encode.buckets")
    return [_mapped(path / shard["file"]) for shard in shards]


def _shards(path: Path, split: str) -> list[dict[str, Any]]:
    index = read_index(path)
    if split not in index["splits"]:
        raise StageError(f"{path} has no split '{split}', only {', '.join(index['splits'])}; see ingest")
    shards: list[dict[str, Any]] = index["splits"][split]["shards"]
    return shards


def _mapped(file: Path) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file without reading them: 8 bytes that give the header's length, JSON, the data."""
    import numpy as np

    kinds: dict[str, Any] = {
        "U8": np.uint8,
        "I32": np.int32,
        "I64": np.int64,
        "F16": np.float16,
        "F32": np.float32,
        "BF16": BFLOAT16,
    }
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return {
        name: np.memmap(file, kinds[entry["dtype"]], "r", 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """An array of a shard -> a tensor of its own; 16-bit integers are the bits of bfloat16, which NumPy lacks."""
    import torch

    tensor = torch.tensor(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
