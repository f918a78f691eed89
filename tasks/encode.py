"""Stage `encode`: images -> model inputs under the codec, captions -> embeddings."""

from __future__ import annotations

from pathlib import Path

from tasks.formats.buckets import bucket_resolutions
from tasks.formats.codec_info import CodecInfo
from tasks.formats.verdict import require_accepted
from tasks.params import EncodeParams
from tasks.runtime import atomic, locks, stage, workspace


def encode(images: Path, accepted: Path, codec: Path, latents: Path, params: EncodeParams) -> None:
    """Write the model's inputs: pixels or latents, with labels or captions, and control maps.

    Latents, embeddings and control maps are cached in the scratch folder by the content that they are computed from:
    a later run encodes only what is new, and a killed run continues where it stopped. Prints a line if a change of the
    codec or of the transform invalidates all of them.
    """
    require_accepted(accepted)
    info = CodecInfo.load(codec)

    from tasks.encoding.rows import distinct_captions, input_resolution, read_rows, require_disk_space

    resolutions = bucket_resolutions(info.size, params.buckets, params.bucket_multiple)
    rows = read_rows(images, resolutions, params.leave_out)
    distinct = distinct_captions(rows) if info.conditioning == "text" else None
    require_disk_space(latents.parent, info, params, resolutions, rows, distinct)

    from tasks.encoding.control import make_controls, spec_of
    from tasks.encoding.encoder import encode_images
    from tasks.encoding.splits import SplitWriter
    from tasks.encoding.texts import Captions
    from tasks.formats.latents import write_index

    with locks.exclusive(workspace.scratch() / "encode.lock"), atomic.writing_folder(latents) as folder:
        encoded = encode_images(images, codec, info, resolutions, rows, params)
        tokens = params.captions == "tokens"
        captions = None if distinct is None else Captions(codec, info, distinct, rows, tokens, params.precision)
        controls = make_controls(images, resolutions, rows, params)
        writer = SplitWriter(images, info, resolutions, encoded, captions, params.shard_size, controls)
        splits = {split: writer.write(folder, split, in_split) for split, in_split in rows.items()}
        texts = captions.write(folder, params.shard_size) if captions else None
        prompts_sha256 = captions.write_prompts(folder) if captions else None
        inputs = [input_resolution(resolution, info) for resolution in resolutions]
        later = params.precision if captions and tokens and params.precision != "no" else None
        write_index(folder, info, splits, inputs, texts, prompts_sha256, spec_of(params), later)
    print("encode:", ", ".join(f"{entry.count} {split}" for split, entry in splits.items()))


if __name__ == "__main__":
    stage.main(encode)
