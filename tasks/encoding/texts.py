"""The distinct captions, each once, as embeddings or as token ids, and the embeddings of the sample prompts.

Embeddings are found in the scratch folder or computed. Token ids are computed again, in a fraction of the time.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
import torch

from models.device import best_device, warn_of_emulation
from models.networks.text_encoder import APPLY_BATCH, load_text_encoder
from models.parallel import shared_out
from tasks.encoding.blocks import Blocks
from tasks.encoding.rows import digests_of
from tasks.formats.latents import Shard, write_prompts, write_shards
from tasks.pictures.digests import Places, digests
from tasks.runtime import closure, workspace
from tasks.runtime.progress import progress

if TYPE_CHECKING:
    from tasks.encoding.rows import Rows
    from tasks.formats.codec_info import CodecInfo
    from tasks.pictures.spooled import SpooledTable

BLOCK = 4096
"""Captions that are embedded and stored at a time."""
TOKENIZED = 1024
"""Captions that are tokenised at a time; the tokenizer keeps memory of its largest call."""
PART = 4 * APPLY_BATCH
"""Captions that a GPU embeds before it takes the next ones."""


class Captions:
    """Every distinct caption in alphabetical order, and the sample prompts.

    With `tokens` the captions are stored as token ids, which training encodes, and else as embeddings.
    """

    def __init__(
        self,
        folder: Path,
        codec: CodecInfo,
        captions: SpooledTable,
        splits: Mapping[str, Rows],
        tokens: bool = False,
        precision: str = "no",
    ) -> None:
        """Embed in `precision` what is new of `captions`, see `rows.distinct_captions`.

        The text encoder in `folder` is loaded only for that.
        """
        assert codec.text is not None and codec.prompts is not None, "the codec has a text encoder"
        self.folder, self.tokens = folder, tokens
        self.prompts = [*codec.prompts, ""]
        self.captions = captions
        batches = (batch for rows in splits.values() for batch in rows.table.batches())
        most = (pc.max(pc.list_value_length(batch.column("captions"))).as_py() for batch in batches)
        self.most_captions = max(most, default=0)
        recipe = {
            "text encoder": codec.text.sha256,
            "code of the text encoder": closure.digest("models/networks/text_encoder.py"),
            **({} if precision == "no" else {"precision": precision}),
        }
        self.precision = precision
        self.blocks = Blocks(workspace.scratch() / "encode" / "texts", recipe)
        self._embed()

    def _wanted(self) -> Iterator[list[str]]:
        """Yield the distinct texts of which embeddings are kept, in parts."""
        if self.tokens:
            yield list(dict.fromkeys(self.prompts))
            return
        for start in range(0, len(self.captions), BLOCK):
            yield self._texts(slice(start, start + BLOCK))
        known = self._places.numbers(self.prompts) >= 0
        new = (text for text, is_caption in zip(self.prompts, known.tolist(), strict=True) if not is_caption)
        yield list(dict.fromkeys(new))

    def _missing(self) -> Iterator[list[str]]:
        """Yield the texts without an embedding, at most `BLOCK` at a time; blocks that are added change nothing."""
        pending: list[str] = []
        for texts in self._wanted():
            known = self.blocks.known(_digests(texts)).tolist()
            pending += [text for text, is_known in zip(texts, known, strict=True) if not is_known]
            if len(pending) >= BLOCK:
                yield pending[:BLOCK]
                del pending[:BLOCK]
        if pending:
            yield pending

    def _embed(self) -> None:
        wanted = np.concatenate([_digests(texts) for texts in self._wanted()])
        missing = int((~self.blocks.known(wanted)).sum())
        if changed := self.blocks.changes():
            print(
                f"encode: changed since the last time: {', '.join(changed)}; all captions are embedded anew", flush=True
            )
        self.blocks.open()
        if missing:
            device = best_device()
            warn_of_emulation("encode.precision", self.precision, device)
            encoder = load_text_encoder(self.folder, device)

            def worker(name: str) -> Callable[[Sequence[str]], torch.Tensor]:
                return functools.partial(encoder.on(name).encode, precision=self.precision)

            for texts in progress(self._missing(), desc="encode: captions", total=-(-missing // BLOCK), delay=2):
                parts = [texts[first : first + PART] for first in range(0, len(texts), PART)]
                embedded = torch.cat(shared_out(worker, parts, device))
                self.blocks.add([_text_hash(text) for text in texts], {"embeddings": embedded.to(torch.bfloat16)})
        self.blocks.forget(wanted)

    def _embeddings(self, texts: Sequence[str]) -> torch.Tensor:
        return self.blocks.take([_text_hash(text) for text in texts])["embeddings"]

    def positions(self, rows: Rows) -> np.ndarray:
        """Return the captions of each image as int32 [n, K], numbers of the distinct ones, padded with -1."""
        positions = np.full((len(rows), self.most_captions), -1, np.int32)
        start = 0
        for batch in rows.table.batches():
            captions = batch.column("captions")
            counts = pc.list_value_length(captions).to_numpy()
            own = positions[start : start + len(batch)]
            # The mask is read row by row, as the flat list of captions is.
            texts = pc.list_flatten(captions).to_pylist()
            own[np.arange(self.most_captions) < counts[:, None]] = self._places.first(digests(texts))
            start += len(batch)
        return positions

    @functools.cached_property
    def _places(self) -> Places:
        """The places of the distinct captions."""
        return Places(digests_of(self.captions, "caption"))

    def write(self, folder: Path, shard_size: int) -> list[Shard]:
        """Write the embeddings or token ids as shards; returns their entries for the index."""
        if self.tokens:
            encoder = load_text_encoder(self.folder)

            def rows(part: slice) -> dict[str, torch.Tensor]:
                starts = range(part.start, part.stop, TOKENIZED)
                texts = (self._texts(slice(start, min(start + TOKENIZED, part.stop))) for start in starts)
                return {"ids": torch.cat([encoder.token_ids(own).to(torch.int32) for own in texts])}
        else:

            def rows(part: slice) -> dict[str, torch.Tensor]:
                return {"embeddings": self._embeddings(self._texts(part))}

        return write_shards(folder, "texts", len(self.captions), rows, shard_size)

    def _texts(self, part: slice) -> list[str]:
        return list(self.captions.slice(part.start, part.stop).strings("caption"))

    def write_prompts(self, folder: Path) -> str:
        """Write the embeddings of the sample prompts and the empty text; returns the file's SHA-256."""
        return write_prompts(folder, self._embeddings(self.prompts))


def _digests(texts: Sequence[str]) -> np.ndarray:
    """Return the digests of the keys of texts, S16 [n]."""
    return digests(map(_text_hash, texts))


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
