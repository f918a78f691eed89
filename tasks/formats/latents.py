"""`data/latents/`: the model's inputs as safetensors shards per split, with an index.

    train-00000.safetensors   pixels uint8 [n, C, H, W], or mean and std bfloat16 [n, V, c, h, w];
                              labels int64 [n], or captions int32 [n, K]: rows of the texts, padded with -1;
                              control uint8 [n, 1 or 3, h, w]: control maps, if `encode.control` makes them
    texts-00000.safetensors   embeddings bfloat16 [n, L, D] of the distinct captions, in alphabetical order; or their
                              token ids, ids int32 [n, L], if `encode.captions` is 'tokens'
    prompts.safetensors       embeddings bfloat16 [P + 1, L, D] of the sample prompts, then of the empty text
    index.json                counts, shards, buckets, codec, conditioning, scaling, digest

A shard holds inputs of one bucket (`tasks/formats/buckets.py`). The identity codec stores pixels. An autoencoder stores
the mean and standard deviation of its posterior, already scaled to the units of the model; V is 2 if the mirrored image
is stored as well. Labels and captions are stored only if the model is conditioned on them. With two text encoders
(SDXL) the embeddings have one more row for the pooled embedding, token ids are int32 [n, 2, L], and each image has
`sizes` int32 [n, 6]; see `models/networks/text_encoder.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import numpy as np
import torch
from safetensors.torch import save

from models.hashing import file_sha256
from models.networks.control_maps import ControlSpec
from tasks.formats.codec_info import AutoencoderInfo, CodecInfo, TextInfo
from tasks.runtime import integrity
from tasks.runtime.errors import StageError
from tasks.runtime.stage_file import Part, StageFile

if TYPE_CHECKING:
    from models.json_files import JsonObject
    from tasks.formats.buckets import Resolution

STAGE = "encode"
"""The stage that writes them."""
SQUARE = 0
"""Index of the bucket of square images."""
INDEX = "index.json"
PROMPTS = "prompts.safetensors"
NUMPY_TYPES = {"U8": "uint8", "I32": "int32", "I64": "int64", "F16": "float16", "F32": "float32", "BF16": "int16"}
"""Type in a safetensors header -> NumPy type; NumPy has no bfloat16, whose bits are read as int16."""

Columns: TypeAlias = "Mapping[str, np.ndarray | torch.Tensor]"
"""Tensors by name with one row per image."""


class Shard(Part):
    """A safetensors file."""

    file: str
    sha256: str


class BucketShard(Shard):
    """A safetensors file with inputs of one bucket."""

    bucket: int


class Split(Part):
    """The images of one split, in all buckets."""

    count: int
    keys_sha256: str
    """Hash of the images' keys, in order."""
    shards: list[BucketShard]


class ImageSize(Part):
    """Channels and side of a square image."""

    channels: int
    size: int


@dataclass(frozen=True)
class InputSpec:
    """The shape of the network's inputs and conditions, as far as the data determines it."""

    channels: int
    size: int
    """Height and width of a square input."""
    conditioning: str = "none"
    """"none", "label" or "text"."""
    classes: int = 0
    text_width: int | None = None
    """Width of a token embedding; None without text."""
    pooled: int | None = None
    """Width of the pooled prompt embedding (SDXL conditioning); None without it."""


class LatentsIndex(StageFile):
    """The content of `index.json`."""

    FORMAT: ClassVar[int] = 3
    STAGE: ClassVar[str] = STAGE
    LATER: ClassVar[tuple[str, ...]] = ("control", "text_precision")
    """Fields that were added within this format: without a value they leave the digest as it was."""

    codec: str
    """Kind of the codec: "identity" or "autoencoder"."""
    conditioning: str
    """"none", "label" or "text"."""
    channels: int
    size: int
    """Height and width of a square input."""
    image: ImageSize
    autoencoder: AutoencoderInfo | None
    classes: list[str]
    text: TextInfo | None
    prompts: list[str] | None
    buckets: list[tuple[int, int]]
    """Height and width of the inputs of each bucket."""
    splits: dict[str, Split]
    texts: list[Shard] | None
    """Shards of the captions; None without text."""
    prompts_sha256: str | None
    digest: str
    """Hash of everything else in the index, so of codec and content."""
    control: ControlSpec | None = None
    """How the control maps were made; None without them."""
    text_precision: str | None = None
    """Precision in which captions that are stored as token ids are to be encoded, such as "bf16"; None is float32."""

    def to_json(self) -> JsonObject:
        """Return the content of the file, without the values of `LATER` that are None."""
        values = super().to_json()
        return {name: value for name, value in values.items() if name not in self.LATER or value is not None}

    @property
    def input_spec(self) -> InputSpec:
        """What the network must fit."""
        text = self.text
        return InputSpec(
            channels=self.channels,
            size=self.size,
            conditioning=self.conditioning,
            classes=len(self.classes),
            text_width=text.width if text else None,
            pooled=text.pooled if text else None,
        )


@dataclass(frozen=True)
class Latents:
    """One bucket of a split in memory, sorted by key: pixels, or mean and std."""

    classes: int
    """Number of classes, which is also the null label; 0 without labels."""
    keys_sha256: str
    """Hash of the keys of the split's images, in order."""
    pixels: np.ndarray | None = None
    """uint8 [N, C, H, W]"""
    mean: torch.Tensor | None = None
    """bfloat16 [N, V, c, h, w]: of the image, and of the mirrored image if V is 2"""
    std: torch.Tensor | None = None
    labels: np.ndarray | None = None
    """int64 [N], 0 to the number of classes - 1"""
    captions: np.ndarray | None = None
    """int32 [N, K]: rows of `texts`, padded with -1"""
    texts: torch.Tensor | None = None
    """bfloat16 [U, L, D]: embeddings of the distinct captions; None if their token ids are stored"""
    prompts: torch.Tensor | None = None
    """bfloat16 [P + 1, L, D]: embeddings of the sample prompts, then of the empty text (the null condition)"""

    @property
    def count(self) -> int:
        inputs = self.mean if self.pixels is None else self.pixels
        return 0 if inputs is None else len(inputs)


def keys_hash(keys: Iterable[str]) -> str:
    """Hash keys in their order, with a line feed between them."""
    content, separator = hashlib.sha256(), ""
    for key in keys:
        content.update(f"{separator}{key}".encode())
        separator = "\n"
    return content.hexdigest()


def write_shards(folder: Path, name: str, count: int, rows: Callable[[slice], Columns], shard_size: int) -> list[Shard]:
    """Write `count` rows as shards of `folder` (a temporary one) and return their entries for the index.

    `rows(part)` returns the tensors or arrays of those rows; one shard at a time is in memory.
    """
    shards = []
    for number, start in enumerate(range(0, count, shard_size)):
        file = folder / f"{name}-{number:05d}.safetensors"
        part = rows(slice(start, min(start + shard_size, count)))
        tensors = {key: torch.as_tensor(value).contiguous() for key, value in part.items()}
        file.write_bytes(save(tensors))  # not save_file: a full disk must raise OSError
        shards.append(Shard(file=file.name, sha256=file_sha256(file)))
    return shards


def write_prompts(folder: Path, embeddings: torch.Tensor) -> str:
    """Write the embeddings [P + 1, L, D] of the sample prompts and the empty text; returns the file's SHA-256."""
    (folder / PROMPTS).write_bytes(save({"embeddings": embeddings.contiguous()}))
    return file_sha256(folder / PROMPTS)


def write_index(
    folder: Path,
    codec: CodecInfo,
    splits: Mapping[str, Split],
    buckets: Sequence[Resolution],
    texts: list[Shard] | None = None,
    prompts_sha256: str | None = None,
    control: ControlSpec | None = None,
    text_precision: str | None = None,
) -> None:
    """Write `index.json`, after all other files; `buckets` are the resolutions of the inputs of each bucket."""
    latent = codec.autoencoder
    index = LatentsIndex(
        codec=codec.kind,
        conditioning=codec.conditioning,
        channels=latent.channels if latent else codec.channels,
        size=latent.size if latent else codec.size,
        image=ImageSize(channels=codec.channels, size=codec.size),
        autoencoder=latent,
        classes=codec.classes,
        text=codec.text,
        prompts=codec.prompts,
        buckets=list(buckets),
        splits=dict(splits),
        texts=texts,
        prompts_sha256=prompts_sha256,
        digest="",
        control=control,
        text_precision=text_precision,
    )
    index.model_copy(update={"digest": _digest(index)}).write(folder / INDEX)


def _digest(index: LatentsIndex) -> str:
    content = index.to_json()
    del content["digest"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


def read_index(path: Path) -> LatentsIndex:
    """Read and check `index.json`.

    Raises:
        StageError: if it is missing, damaged or of another format.
    """
    index = LatentsIndex.read(path / INDEX)
    if _digest(index) != index.digest:
        raise StageError(f"{path / INDEX} is damaged: its digest does not fit; {integrity.remedy(STAGE)}")
    return index


def load_latents(path: Path, split: str, bucket: int = SQUARE) -> Latents:
    """Read one bucket of a split into memory.

    Raises:
        StageError: if the split or the bucket has no images, or a file is damaged.
    """
    index = read_index(path)
    parts, texts = open_shards(path, split, bucket), open_texts(path)
    embedded = bool(texts) and "embeddings" in texts[0]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Latents(
        pixels=columns.get("pixels"),
        mean=as_tensor(columns["mean"]) if "mean" in columns else None,
        std=as_tensor(columns["std"]) if "std" in columns else None,
        labels=columns.get("labels"),
        captions=columns.get("captions"),
        texts=as_tensor(np.concatenate([part["embeddings"] for part in texts])) if embedded else None,
        prompts=load_prompts(path),
        classes=len(index.classes),
        keys_sha256=index.splits[split].keys_sha256,
    )


def load_prompts(path: Path) -> torch.Tensor | None:
    """Read the embeddings bfloat16 [P + 1, L, D] of the sample prompts and of the empty text; None without text."""
    expected = read_index(path).prompts_sha256
    if not expected:
        return None
    integrity.require(path, {PROMPTS: expected}, STAGE)
    return as_tensor(_mapped(path / PROMPTS)["embeddings"])


def open_texts(path: Path) -> list[dict[str, np.ndarray]]:
    """Memory-map the shards of the captions, whose rows the column `captions` names; empty without text."""
    return _opened(path, read_index(path).texts or [])


def buckets_of(path: Path, split: str) -> list[int]:
    """Return the indices of the buckets in which a split has images.

    Raises:
        StageError: if the split does not exist.
    """
    return sorted({shard.bucket for shard in _shards(path, split)})


def open_shards(path: Path, split: str, bucket: int = SQUARE) -> list[dict[str, np.ndarray]]:
    """Memory-map the shards of one bucket of a split; `as_tensor` converts rows of them to tensors.

    Raises:
        StageError: if the split or the bucket has no images, or a shard is damaged.
    """
    return _opened(path, shards_of(path, split, bucket))


def shards_of(path: Path, split: str, bucket: int = SQUARE) -> list[BucketShard]:
    """Return the entries of the shards of one bucket of a split.

    Raises:
        StageError: if the split or the bucket has no images.
    """
    shards = [shard for shard in _shards(path, split) if shard.bucket == bucket]
    if not shards:
        raise StageError(f"split '{split}' of {path} has no image in bucket {bucket}; see encode.buckets")
    return shards


def _opened(path: Path, shards: Sequence[Shard]) -> list[dict[str, np.ndarray]]:
    integrity.require(path, {shard.file: shard.sha256 for shard in shards}, STAGE)
    return [_mapped(path / shard.file) for shard in shards]


def _shards(path: Path, split: str) -> list[BucketShard]:
    index = read_index(path)
    if split not in index.splits:
        raise StageError(f"{path} has no split '{split}', only {', '.join(index.splits)}; see ingest")
    return index.splits[split].shards


def _mapped(file: Path) -> dict[str, np.ndarray]:
    """Memory-map the tensors of a safetensors file: 8 bytes with the header's length, a JSON header, the data."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        tensors = tensors_of(json.loads(stream.read(length)))
    return {
        name: np.memmap(file, tensor.dtype, "r", 8 + length + tensor.start, tensor.shape)
        for name, tensor in tensors.items()
    }


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file."""

    dtype: str
    """As NumPy reads it, see `NUMPY_TYPES`."""
    start: int
    """First byte after the header."""
    shape: tuple[int, ...]


def tensors_of(header: JsonObject) -> dict[str, StoredTensor]:
    """Return the tensors that the header of a safetensors file lists, by name."""
    return {
        name: StoredTensor(NUMPY_TYPES[entry["dtype"]], entry["data_offsets"][0], tuple(entry["shape"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """Copy an array of a shard to a tensor; int16 holds the bits of bfloat16."""
    tensor = torch.tensor(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
