"""What `prior` writes: the pictures, and the inputs of the training in the format of `data/latents`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.numpy import save_file

from models.device import best_device
from models.images.pictures import grid, save_png, shrunk
from models.networks.autoencoder import load_autoencoder
from models.networks.text_encoder import TextEncoder, load_text_encoder
from tasks.encoding.transform import encode_pixels
from tasks.formats import latents
from tasks.formats.latents import SQUARE, BucketShard, Split
from tasks.formats.prior import BEFORE, CLASS, FILE, GRID, LATENTS, PICTURES, SUBJECT, TOKENS, Prior
from tasks.runtime import integrity

if TYPE_CHECKING:
    from tasks.formats.codec_info import CodecInfo
    from tasks.params import PriorParams

SHOWN, COLUMNS, SIDE = 40, 10, 128
"""Images of the grid, its columns, and the largest side of an image in it."""
SHARD = 4096


def write(
    folder: Path,
    subject: np.ndarray,
    classes: np.ndarray,
    before: np.ndarray,
    codec: Path,
    info: CodecInfo,
    params: PriorParams,
) -> None:
    """Write the output into the existing empty `folder`; pictures are uint8 [n, C, S, S]."""
    pictures = {SUBJECT: subject, CLASS: classes, BEFORE: before}
    save_file({name: np.ascontiguousarray(pixels) for name, pixels in pictures.items()}, folder / PICTURES)
    shown = shrunk((classes if len(classes) else before)[:SHOWN], SIDE)
    save_png(grid(shown, COLUMNS, max(1, SIDE // 2 // shown.shape[-1])), folder / GRID)
    texts, encoder = (
        [params.instance_prompt or "", params.class_prompt or "", ""],
        load_text_encoder(codec, best_device()),
    )
    if isinstance(encoder, TextEncoder):
        save_file({"ids": encoder.token_ids(texts).numpy()}, folder / TOKENS)
    files = integrity.checksums(folder)
    (folder / LATENTS).mkdir()
    embedded = encoder.encode(texts).to(torch.bfloat16)
    digest = _write_inputs(folder / LATENTS, subject, classes, codec, info, texts[:2], embedded)
    Prior(
        instance_prompt=params.instance_prompt,
        class_prompt=params.class_prompt,
        token=params.token,
        contexts=list(params.contexts),
        images=len(classes),
        measured=params.measured,
        sampler=params.sampler,
        steps=params.steps,
        guidance_scale=params.guidance_scale,
        seed=params.seed,
        digest=digest,
        files=files,
    ).write(folder / FILE)


def _write_inputs(
    folder: Path,
    subject: np.ndarray,
    classes: np.ndarray,
    codec: Path,
    info: CodecInfo,
    prompts: list[str],
    embedded: torch.Tensor,
) -> str:
    """Write both splits and the embeddings of their prompts and of ""; returns the digest of the index."""
    splits = {}
    for text, (name, pixels) in enumerate(((SUBJECT, subject), (CLASS, classes))):
        columns = _columns(pixels, text, codec, info)

        def rows(part: slice, columns: dict[str, np.ndarray | torch.Tensor] = columns) -> latents.Columns:
            return {key: column[part] for key, column in columns.items()}

        shards = latents.write_shards(folder, name, len(pixels), rows, SHARD)
        entries = [BucketShard(file=shard.file, sha256=shard.sha256, bucket=SQUARE) for shard in shards]
        keys = [f"{name}-{number}" for number in range(len(pixels))]
        splits[name] = Split(count=len(pixels), keys_sha256=latents.keys_hash(keys), shards=entries)
    side = info.autoencoder.size if info.autoencoder else info.size
    shards = latents.write_shards(folder, "texts", 2, lambda part: {"embeddings": embedded[:2][part]}, SHARD)
    described = info.model_copy(update={"classes": [], "prompts": prompts})
    latents.write_index(folder, described, splits, [(side, side)], shards, latents.write_prompts(folder, embedded))
    return latents.read_index(folder).digest


def _columns(pixels: np.ndarray, text: int, codec: Path, info: CodecInfo) -> dict[str, np.ndarray | torch.Tensor]:
    """Return the columns of a split whose images all have the caption number `text`.

    Latents of the mirrored images are stored as well, so that `train.horizontal_flip` may be set or not.
    """
    count = len(pixels)
    columns: dict[str, np.ndarray | torch.Tensor] = {"captions": np.full((count, 1), text, np.int32)}
    if info.text and info.text.pooled:
        sizes = [info.size, info.size, 0, 0, info.size, info.size]
        columns["sizes"] = np.tile(np.array(sizes, np.int32), (count, 1))
    if info.autoencoder is None:
        return columns | {"pixels": pixels}
    if not count:
        return columns
    network = load_autoencoder(codec / "vae", best_device())
    return columns | encode_pixels(network, pixels, mirrored=True)
