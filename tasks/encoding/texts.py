"""Embeddings of the captions, each distinct caption once, found in the scratch folder or computed."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from models.device import best_device
from models.networks.text_encoder import APPLY_BATCH, load_text_encoder
from models.parallel import shared_out
from tasks.encoding.blocks import Blocks
from tasks.formats.latents import Shard, write_prompts, write_shards
from tasks.runtime import closure, workspace
from tasks.runtime.progress import progress

if TYPE_CHECKING:
    from tasks.encoding.rows import Row
    from tasks.formats.codec_info import CodecInfo

BLOCK = 4096
"""Captions that are embedded and stored at a time."""
PART = 4 * APPLY_BATCH
"""Captions that a GPU embeds before it takes the next ones."""


class CaptionEmbeddings:
    """Every distinct caption in alphabetical order with its embedding, and those of the sample prompts."""

    def __init__(
        self, folder: Path, codec: CodecInfo, splits: Mapping[str, Sequence[Row]], precision: str = "no"
    ) -> None:
        """Load the text encoder in `folder` if a caption is new, and embed what is new in `precision`."""
        assert codec.text is not None and codec.prompts is not None, "the codec has a text encoder"
        rows = [row for split in splits.values() for row in split]
        self.prompts = [*codec.prompts, ""]
        self.captions = sorted({caption for row in rows for caption in row.captions})
        self.position = {caption: number for number, caption in enumerate(self.captions)}
        self.most_captions = max((len(row.captions) for row in rows), default=0)
        recipe = {
            "text encoder": codec.text.sha256,
            "code of the text encoder": closure.digest("models/networks/text_encoder.py"),
            **({} if precision == "no" else {"precision": precision}),
        }
        self.precision = precision
        self.blocks = Blocks(workspace.scratch() / "encode" / "texts", recipe)
        self._compute(folder)

    def _compute(self, folder: Path) -> None:
        wanted = {_text_hash(text): text for text in [*self.captions, *self.prompts]}
        if changed := self.blocks.changes():
            print(
                f"encode: changed since the last time: {', '.join(changed)}; all captions are embedded anew", flush=True
            )
        self.blocks.open()
        if missing := self.blocks.missing(wanted):
            device = best_device()
            encoder = load_text_encoder(folder, device)

            def worker(name: str) -> Callable[[Sequence[str]], torch.Tensor]:
                return functools.partial(encoder.on(name).encode, precision=self.precision)

            starts = range(0, len(missing), BLOCK)
            for start in progress(starts, desc="encode: captions", delay=2):
                keys = missing[start : start + BLOCK]
                texts = [wanted[key] for key in keys]
                parts = [texts[first : first + PART] for first in range(0, len(texts), PART)]
                embedded = torch.cat(shared_out(worker, parts, device))
                self.blocks.add(keys, {"embeddings": embedded.to(torch.bfloat16)})
        self.blocks.forget(wanted)

    def _embeddings(self, texts: Sequence[str]) -> torch.Tensor:
        return self.blocks.take([_text_hash(text) for text in texts])["embeddings"]

    def positions(self, rows: Sequence[Row]) -> np.ndarray:
        """Return the captions of each image as int32 [n, K], rows of the embeddings, padded with -1."""
        positions = np.full((len(rows), self.most_captions), -1, np.int32)
        for padded, row in zip(positions, rows, strict=True):
            padded[: len(row.captions)] = [self.position[caption] for caption in row.captions]
        return positions

    def write(self, folder: Path, shard_size: int) -> list[Shard]:
        """Write the embeddings as shards; returns their entries for the index."""

        def rows(part: slice) -> dict[str, torch.Tensor]:
            return {"embeddings": self._embeddings(self.captions[part])}

        return write_shards(folder, "texts", len(self.captions), rows, shard_size)

    def write_prompts(self, folder: Path) -> str:
        """Write the embeddings of the sample prompts and the empty text; returns the file's SHA-256."""
        return write_prompts(folder, self._embeddings(self.prompts))


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
