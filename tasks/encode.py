"""The stage `encode`: images -> the model's inputs under the codec."""

from __future__ import annotations

import json
from pathlib import Path

from tasks import atomic, stage
from tasks.images import load_pixels, read_index, require_accepted
from tasks.latents import Latents, keys_hash, write_index, write_split
from tasks.params import EncodeParams, ImageParams


def encode(images: Path, accepted: Path, codec: Path, latents: Path, params: EncodeParams) -> None:
    """Turn every image into what the model reads: pixels at the codec's size, with the label where it conditions."""
    require_accepted(accepted)
    description = json.loads((codec / "codec.json").read_text(encoding="utf-8"))
    form = ImageParams(size=description["size"], channels=description["channels"])
    with atomic.writing_folder(latents) as folder:
        splits = {}
        for split in read_index(images)["splits"]:
            samples = load_pixels(images, split, form)
            inputs = Latents(
                pixels=samples.pixels,
                labels=samples.labels if description["conditioning"] == "label" else None,
                embeddings=None,
                null_embedding=None,
                classes=len(description["classes"]),
                keys_sha256=keys_hash(samples.keys),
            )
            splits[split] = write_split(folder, split, inputs, params.shard_size)
        write_index(folder, description, splits, null=None)
    print("encode:", ", ".join(f"{entry['count']} {split}" for split, entry in splits.items()))


if __name__ == "__main__":
    stage.main(encode)
