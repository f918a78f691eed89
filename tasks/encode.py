"""The stage `encode`: images -> the model's inputs under the codec."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tasks import atomic, stage
from tasks.images import load_pixels, read_index, require_accepted
from tasks.latents import Latents, keys_hash, write_index, write_split
from tasks.params import EncodeParams, ImageParams

if TYPE_CHECKING:
    import numpy as np

Embed: TypeAlias = "Callable[[list[list[str]]], np.ndarray]"


def encode(images: Path, accepted: Path, codec: Path, latents: Path, params: EncodeParams) -> None:
    """Turn every image into what the model reads: pixels at the codec's size, with the label or the embeddings of its
    captions where those condition the model."""
    require_accepted(accepted)
    description = json.loads((codec / "codec.json").read_text(encoding="utf-8"))
    form = ImageParams(size=description["size"], channels=description["channels"])
    embed = _embedder(codec) if description["conditioning"] == "text" else None
    with atomic.writing_folder(latents) as folder:
        splits = {}
        for split in read_index(images)["splits"]:
            samples = load_pixels(images, split, form)
            inputs = Latents(
                pixels=samples.pixels,
                labels=samples.labels if description["conditioning"] == "label" else None,
                embeddings=embed(samples.captions) if embed else None,
                prompts=None,
                classes=len(description["classes"]),
                keys_sha256=keys_hash(samples.keys),
            )
            splits[split] = write_split(folder, split, inputs, params.shard_size)
        write_index(folder, description, splits, _prompts(embed, description) if embed else None)
    print("encode:", ", ".join(f"{entry['count']} {split}" for split, entry in splits.items()))


def _embedder(codec: Path) -> Embed:
    """Captions of each image -> embeddings float32 [N, K, D]; who has fewer than K captions has them repeated."""
    import numpy as np

    from models.text_encoder import encode_captions, load_text_encoder

    encoder, tokenizer = load_text_encoder(codec)

    def embed(captions: list[list[str]]) -> np.ndarray:
        distinct = sorted({text for texts in captions for text in texts})
        place = {text: i for i, text in enumerate(distinct)}
        most = max(map(len, captions))
        rows = [[place[texts[k % len(texts)]] for k in range(most)] for texts in captions]
        return encode_captions(encoder, tokenizer, distinct)[np.asarray(rows)]

    return embed


def _prompts(embed: Embed, description: dict[str, Any]) -> np.ndarray:
    """Embeddings float32 [classes + 1, D] of the class prompts, the empty text last."""
    return embed([[prompt] for prompt in [*description["prompts"], ""]])[:, 0]


if __name__ == "__main__":
    stage.main(encode)
