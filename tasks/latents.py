"""The form of the model's inputs: safetensors shards per split, and an index.

    data/latents/train-00000.safetensors    pixels uint8 [n, C, H, W], labels int64 [n], embeddings float32 [n, K, D]
    data/latents/prompts.safetensors        embeddings float32 [classes + 1, D]: the class prompts, then the empty text
    data/latents/index.json                 counts, shards, codec, conditioning, digest

Under the identity codec the inputs are the pixels themselves. Labels and embeddings are there
where the conditioning needs them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import atomic
from tasks.source import sha256_of
from tasks.stage import StageError

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
PROMPTS = "prompts.safetensors"


@dataclass(frozen=True)
class Latents:
    """One split of the model's inputs, sorted by key."""

    pixels: np.ndarray
    """uint8 [N, C, H, W]"""
    labels: np.ndarray | None
    """int64 [N], 0 to the number of classes - 1"""
    embeddings: np.ndarray | None
    """float32 [N, K, D]: K captions for each image"""
    prompts: np.ndarray | None
    """float32 [classes + 1, D]: what asks for each class, and the empty text that stands for no condition"""
    classes: int
    """Number of classes, which is also the label that stands for "no condition"; 0 without labels."""
    keys_sha256: str
    """Hash of the images' keys, in order."""


def keys_hash(keys: list[str]) -> str:
    """sha256 of keys in their order."""
    return hashlib.sha256("\n".join(keys).encode("utf-8")).hexdigest()


def write_split(folder: Path, split: str, latents: Latents, shard_size: int) -> dict[str, Any]:
    """Write the shards of one split into `folder` (a temporary one); returns its entry for the index."""
    from safetensors.numpy import save

    count = len(latents.pixels)
    tensors = {"pixels": latents.pixels, "labels": latents.labels, "embeddings": latents.embeddings}
    shards = []
    for number, start in enumerate(range(0, count, shard_size)):
        name = f"{split}-{number:05d}.safetensors"
        part = {key: tensor[start : start + shard_size] for key, tensor in tensors.items() if tensor is not None}
        (folder / name).write_bytes(save(part))  # an ordinary write: a full disk is an OSError as everywhere
        shards.append({"file": name, "sha256": sha256_of(folder / name)})
    return {"count": count, "keys_sha256": latents.keys_sha256, "shards": shards}


def write_index(folder: Path, codec: dict[str, Any], splits: dict[str, Any], prompts: np.ndarray | None) -> None:
    """Write `index.json` (and the prompts' embeddings) last; its digest covers codec and content."""
    from safetensors.numpy import save

    if prompts is not None:
        (folder / PROMPTS).write_bytes(save({"embeddings": prompts}))
    index = {
        "format": FORMAT,
        "codec": codec["kind"],
        "conditioning": codec["conditioning"],
        "channels": codec["channels"],
        "size": codec["size"],
        "classes": codec["classes"],
        "splits": splits,
        "prompts_sha256": None if prompts is None else sha256_of(folder / PROMPTS),
    }
    canonical = json.dumps(index, sort_keys=True).encode("utf-8")
    atomic.write_json(folder / "index.json", index | {"digest": hashlib.sha256(canonical).hexdigest()})


def read_index(path: Path) -> dict[str, Any]:
    """`index.json`: format, codec, conditioning, channels, size, classes, splits {name: count, keys_sha256, shards},
    digest. Raises `StageError` where it is missing or of another format."""
    try:
        index: dict[str, Any] = json.loads((path / "index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path} holds no index.json; run 'dvc repro encode'") from None
    if index.get("format") != FORMAT:
        raise StageError(f"{path} has format {index.get('format')}, not {FORMAT}; run 'dvc repro -f encode'")
    return index


def load_latents(path: Path, split: str) -> Latents:
    """One split of the model's inputs, read into memory. Raises `StageError` where there is no such split."""
    import numpy as np

    index = read_index(path)
    parts = open_shards(path, split)

    def joined(name: str) -> np.ndarray | None:
        return np.concatenate([part[name] for part in parts]) if name in parts[0] else None

    return Latents(
        pixels=np.concatenate([part["pixels"] for part in parts]),
        labels=joined("labels"),
        embeddings=joined("embeddings"),
        prompts=load_prompts(path),
        classes=len(index["classes"]),
        keys_sha256=index["splits"][split]["keys_sha256"],
    )


def load_prompts(path: Path) -> np.ndarray | None:
    """Embeddings float32 [classes + 1, D] of what asks for each class, and of no condition; None without captions."""
    from safetensors.numpy import load_file

    return load_file(path / PROMPTS)["embeddings"] if read_index(path)["prompts_sha256"] else None


def open_shards(path: Path, split: str) -> list[dict[str, np.ndarray]]:
    """The tensors of each shard of a split, memory-mapped: what is not indexed is not read.

    Raises `StageError` where there is no such split.
    """
    index = read_index(path)
    if split not in index["splits"]:
        raise StageError(f"{path} has no split '{split}', only {', '.join(index['splits'])}; see ingest")
    return [_mapped(path / shard["file"]) for shard in index["splits"][split]["shards"]]


def _mapped(file: Path) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file without reading them: 8 bytes that give the header's length, JSON, the data."""
    import numpy as np

    kinds = {"U8": np.uint8, "I64": np.int64, "F16": np.float16, "F32": np.float32}
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return {
        name: np.memmap(file, kinds[entry["dtype"]], "r", 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }
