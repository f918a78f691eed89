"""The stage `encode`: images -> the model's inputs under the codec, captions -> embeddings."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tasks.encoding.blocks import Blocks
from tasks.encoding.transform import BATCH, Chunk, Encoded, decode_chunk, encode_pixels
from tasks.formats import buckets
from tasks.formats.latents import keys_hash, write_index, write_prompts, write_shards
from tasks.formats.verdict import require_accepted
from tasks.params import EncodeParams
from tasks.pictures import decoding
from tasks.pictures.images import read_columns, read_encoded
from tasks.runtime import atomic, closure, integrity, locks, stage, workspace
from tasks.runtime.disk import require_space

if TYPE_CHECKING:
    import numpy as np
    import torch

CHUNK = 4 * BATCH
CEILING_CHUNKS = 2
"""Chunks per worker over which decoding alone and encoding alone are timed."""
FED_AHEAD = 3
"""Chunks that are with a GPU: one in work, the others ready for it."""
TEXT_BLOCK = 4096
BFLOAT16_BYTES = 2


@dataclass(frozen=True)
class Row:
    """What `encode` must know of an image besides its pixels."""

    key: str
    sha256: str
    bucket: int
    label: int
    captions: list[str]
    width: int
    height: int


def encode(images: Path, accepted: Path, codec: Path, latents: Path, params: EncodeParams) -> None:
    """Turn every image into what the model reads: pixels in the form of its bucket, or the mean and standard deviation
    of their latent; with the label, or the embeddings of its captions where those condition the model.

    Latents and embeddings are kept in the scratch folder by the content that they were made of: only what is new is
    computed, and a killed run goes on where it was. Says so where a change of codec or transform makes all of it new.
    """
    require_accepted(accepted)
    description = integrity.read_described(codec, "codec.json", "codec")
    forms = buckets.forms(description["size"], params.buckets, params.bucket_multiple)
    rows = _rows(images, forms)
    _print_disk_cost(description, params, forms, rows, latents)
    with locks.exclusive(workspace.scratch() / "encode.lock"), atomic.writing_folder(latents) as folder:
        blocks = _encoded_images(images, codec, description, forms, rows, params)
        texts = _Texts(codec, description, rows) if description["conditioning"] == "text" else None
        splits = {
            split: _write_split(folder, split, its, images, description, forms, blocks, texts, params)
            for split, its in rows.items()
        }
        inputs = [_as_input(form, description) for form in forms]
        if texts:
            write_index(folder, description, splits, inputs, texts.write(folder, params), texts.write_prompts(folder))
        else:
            write_index(folder, description, splits, inputs)
    print("encode:", ", ".join(f"{entry['count']} {split}" for split, entry in splits.items()))


def _rows(images: Path, forms: Sequence[buckets.Form]) -> dict[str, list[Row]]:
    """Split -> its images, sorted by bucket and key."""
    columns = ["key", "split", "sha256", "label", "captions", "height", "width"]
    rows: dict[str, list[Row]] = {}
    for row in read_columns(images, columns).to_pylist():
        label = -1 if row["label"] is None else row["label"]
        bucket = buckets.nearest(row["height"], row["width"], forms)
        known = Row(row["key"], row["sha256"], bucket, label, row["captions"], row["width"], row["height"])
        rows.setdefault(row["split"], []).append(known)
    return {split: sorted(its, key=lambda row: (row.bucket, row.key)) for split, its in sorted(rows.items())}


def _as_input(form: buckets.Form, description: dict[str, Any]) -> buckets.Form:
    """Of images -> of what the model reads of them."""
    latent = description.get("autoencoder")
    smaller = description["size"] // latent["size"] if latent else 1
    return form[0] // smaller, form[1] // smaller


def _write_split(
    folder: Path,
    split: str,
    rows: list[Row],
    images: Path,
    description: dict[str, Any],
    forms: Sequence[buckets.Form],
    blocks: Blocks | None,
    texts: _Texts | None,
    params: EncodeParams,
) -> dict[str, Any]:
    shards: list[dict[str, Any]] = []
    for bucket, form in enumerate(forms):
        its = [row for row in rows if row.bucket == bucket]
        name = split if len(forms) == 1 else f"{split}-{form[0]}x{form[1]}"
        tensors = _tensors(its, name, form, images, description, blocks, texts)
        written = write_shards(folder, name, len(its), tensors, params.shard_size)
        shards += [{**shard, "bucket": bucket} for shard in written]
    return {"count": len(rows), "keys_sha256": keys_hash([row.key for row in rows]), "shards": shards}


def _tensors(
    rows: list[Row],
    name: str,
    form: buckets.Form,
    images: Path,
    description: dict[str, Any],
    blocks: Blocks | None,
    texts: _Texts | None,
) -> Callable[[slice], dict[str, Any]]:
    """What gives the tensors of a part of `rows`, all of one bucket."""
    import numpy as np

    pixels = None if blocks else _pixels(rows, name, (description["channels"], *form), images)

    def tensors(part: slice) -> dict[str, Any]:
        some = rows[part]
        inputs: dict[str, Any] = blocks.take([row.sha256 for row in some]) if blocks else {}
        if pixels is not None:
            inputs["pixels"] = pixels[part]
        if description["conditioning"] == "label":
            inputs["labels"] = np.array([row.label for row in some], np.int64)
        if texts:
            inputs["captions"] = texts.places(some)
        if (description.get("text") or {}).get("pooled"):
            inputs["sizes"] = np.array([sizes(row.height, row.width, form) for row in some], np.int32)
        return inputs

    return tensors


def sizes(height: int, width: int, form: buckets.Form) -> tuple[int, int, int, int, int, int]:
    """What Stable Diffusion XL is told of a picture (Podell et al. 2023, section 2.2): its height and width as
    published, top and left of the middle in the picture brought down to cover `form`, and height and width drawn."""
    scale = max(form[0] / height, form[1] / width)
    top, left = (round((whole * scale - drawn) / 2) for whole, drawn in zip((height, width), form, strict=True))
    return height, width, top, left, *form


def _pixels(rows: list[Row], name: str, shape: tuple[int, int, int], images: Path) -> np.ndarray:
    """uint8 [len(rows), *shape]: the pictures themselves."""
    import numpy as np

    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.sha256, []).append(place)
    pixels = np.empty((len(rows), *shape), np.uint8)
    bar = {"unit": "img", "mininterval": 1, "dynamic_ncols": True, "delay": 2}
    for sha256, data, size in tqdm(read_encoded(images, places), f"read {name}", len(places), **bar):
        pixels[places[sha256]] = decoding.ingested(data, size, shape[1:], shape[0])
    return pixels


def _print_disk_cost(
    description: dict[str, Any],
    params: EncodeParams,
    forms: Sequence[buckets.Form],
    rows: dict[str, list[Row]],
    out: Path,
) -> None:
    """Say what 100,000 images take, before anything is computed. Raises `StageError` where they do not fit."""
    filled = [sum(row.bucket == bucket for its in rows.values() for row in its) for bucket in range(len(forms))]
    sides = [_as_input(form, description) for form in forms]
    area = sum(height * width * count for (height, width), count in zip(sides, filled, strict=True))
    latent, text = description.get("autoencoder"), description.get("text")
    each = description["channels"]
    if latent:
        each = 2 * (1 + params.horizontal_flip) * latent["channels"] * BFLOAT16_BYTES
    captions = len({text for its in rows.values() for row in its for text in row.captions}) if text else 0
    caption = (text["length"] + bool(text.get("pooled"))) * text["width"] * BFLOAT16_BYTES if text else 0
    line = f"encode: 100,000 images take {each * area / max(1, sum(filled)) / 10:,.1f} MB"
    if text:
        line += f", 100,000 different captions {caption / 10:,.1f} MB"
    kept = each * area * (latent is not None) + caption * captions
    print(line + (", and as much in the scratch folder" if kept else ""), flush=True)
    if len(forms) > 1:
        told = (f"{width}x{height} {count}" for (height, width), count in zip(forms, filled, strict=True))
        print(f"encode: images by bucket: {', '.join(told)}", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    require_space(out.parent, each * area + caption * captions + kept)


def _encoded_images(
    images: Path,
    codec: Path,
    description: dict[str, Any],
    forms: Sequence[buckets.Form],
    rows: dict[str, list[Row]],
    params: EncodeParams,
) -> Blocks | None:
    """The latents of all images, computed where they are new; None under the identity codec."""
    if not description.get("autoencoder"):
        return None
    recipe = {
        "size of the images": [description["channels"], description["size"]],
        "autoencoder": description["autoencoder"]["sha256"],
        "buckets": [list(form) for form in forms],
        "mirrored copies": params.horizontal_flip,
        "code of the transform": closure.digest("tasks/formats/buckets.py", "tasks/encoding/transform.py"),
    }
    blocks = Blocks(workspace.scratch() / "encode" / "images", recipe)
    wanted = {row.sha256: forms[row.bucket] for its in rows.values() for row in its}
    changed = blocks.changes()
    if changed:
        print(f"encode: changed since the last time: {', '.join(changed)}; all images are encoded anew", flush=True)
    blocks.open()
    missing = {sha256: wanted[sha256] for sha256 in blocks.missing(wanted)}
    print(f"encode: {len(missing)} images to encode, {len(wanted) - len(missing)} known", flush=True)
    if missing:
        _encode_missing(images, codec, description["channels"], missing, blocks, params)
    blocks.forget(wanted)
    return blocks


def _encode_missing(
    images: Path, codec: Path, channels: int, missing: dict[str, buckets.Form], blocks: Blocks, params: EncodeParams
) -> None:
    """Decode and encode in threads, which leave Python's lock for both; each chunk is kept as soon as it is done."""
    import torch

    from models.device import best_device
    from models.networks.autoencoder import load_autoencoder

    device = best_device()
    network = load_autoencoder(codec / "vae", device)
    threads = torch.get_num_threads()
    # One thread for each worker's arithmetic: no sum is divided differently on another machine.
    with ThreadPoolExecutor(params.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        encoder = Encoder(pool, params.workers, network, channels, params.horizontal_flip, device)
        sample: list[Chunk] = []
        started, worked = time.perf_counter(), time.process_time()
        with tqdm(total=len(missing), desc="encode", unit="img", mininterval=1, dynamic_ncols=True) as bar:
            for chunk, tensors in encoder.encoded(_chunks(images, missing)):
                blocks.add([sha256 for sha256, _, _ in chunk.pictures], tensors)
                bar.update(len(chunk))
                if len(sample) < CEILING_CHUNKS * params.workers and len(chunk) == CHUNK:
                    sample.append(chunk)
        rate, work = (len(missing) / (time.perf_counter() - started), (time.process_time() - worked) / len(missing))
        if len(sample) == CEILING_CHUNKS * params.workers:
            _print_ceilings(encoder, sample, rate, work)
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Encoder:
    """An autoencoder and what feeds it: `workers` threads of `pool`."""

    pool: ThreadPoolExecutor
    workers: int
    network: Any
    channels: int
    mirrored: bool
    device: str

    def encoded(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, dict[str, torch.Tensor]]]:
        """Chunks with their latents, in order. On a CPU each worker decodes and encodes, so that no core waits for
        another; before a GPU they only decode, and one more thread keeps it busy."""
        if self.device == "cpu":
            yield from _in_order(self.pool, lambda chunk: self._encode(self._decode(chunk)), chunks, 2 * self.workers)
            return
        with ThreadPoolExecutor(1) as feeder:
            yield from _in_order(
                feeder, self._encode, _in_order(self.pool, self._decode, chunks, 2 * self.workers), FED_AHEAD
            )

    def _decode(self, chunk: Chunk) -> tuple[Chunk, np.ndarray]:
        return chunk, decode_chunk(chunk, self.channels)

    def _encode(self, decoded: tuple[Chunk, np.ndarray]) -> tuple[Chunk, dict[str, torch.Tensor]]:
        chunk, pixels = decoded
        return chunk, encode_pixels(self.network, pixels, self.mirrored)

    def ceilings(self, sample: list[Chunk]) -> tuple[float, float]:
        """Images per second of decoding alone and of encoding alone, by whoever does either."""
        started = time.perf_counter()
        decoded = list(self.pool.map(self._decode, sample))
        between = time.perf_counter()
        list((self.pool.map if self.device == "cpu" else map)(self._encode, decoded))
        ended = time.perf_counter()
        count = sum(map(len, sample))
        return count / (between - started), count / (ended - between)


def _chunks(images: Path, missing: dict[str, buckets.Form]) -> Iterator[Chunk]:
    """The missing images (sha256 -> form), those of one form together."""
    begun: dict[buckets.Form, list[Encoded]] = {}
    for picture in read_encoded(images, missing):
        form = missing[picture[0]]
        pictures = begun.setdefault(form, [])
        pictures.append(picture)
        if len(pictures) == CHUNK:
            yield Chunk(form, begun.pop(form))
    for form, pictures in sorted(begun.items()):
        yield Chunk(form, pictures)


def _in_order(pool: ThreadPoolExecutor, work: Callable[[Any], Any], items: Iterable[Any], ahead: int) -> Iterator[Any]:
    """`work` of each item, in the order of the items, with at most `ahead` of them in memory."""
    waiting: deque[Future[Any]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()


def _print_ceilings(encoder: Encoder, sample: list[Chunk], rate: float, work: float) -> None:
    """Print the rate of the whole beside what its two halves allow. `work` is its CPU time for an image, of which the
    share that the halves need is the same on a machine that has other things to do."""
    worked = time.process_time()
    decode, encode = encoder.ceilings(sample)
    needed = (time.process_time() - worked) / sum(map(len, sample))
    # On a CPU both share the cores; on a GPU the slower of the two sets the pace.
    allowed = 1 / (1 / decode + 1 / encode) if encoder.device == "cpu" else min(decode, encode)
    print(
        f"encode: {rate:,.0f} img/s; decoding alone {decode:,.0f}, the encoder alone {encode:,.0f} img/s: "
        f"{rate / allowed:.0%} of what the two allow ({needed / work:.0%} by CPU time)"
    )


class _Texts:
    """Every caption once, in alphabetical order, with its embedding found or computed."""

    def __init__(self, codec: Path, description: dict[str, Any], rows: dict[str, list[Row]]) -> None:
        self.prompts = [*description["prompts"], ""]
        self.distinct = sorted({text for its in rows.values() for row in its for text in row.captions})
        self.place = {text: number for number, text in enumerate(self.distinct)}
        self.most = max((len(row.captions) for its in rows.values() for row in its), default=0)
        recipe = {
            "text encoder": description["text"]["sha256"],
            "code of the text encoder": closure.digest("models/networks/text_encoder.py"),
        }
        self.blocks = Blocks(workspace.scratch() / "encode" / "texts", recipe)
        self._compute(codec)

    def _compute(self, codec: Path) -> None:
        import torch

        from models.device import best_device
        from models.networks.text_encoder import load_text_encoder

        wanted = {_text_hash(text): text for text in [*self.distinct, *self.prompts]}
        changed = self.blocks.changes()
        if changed:
            print(
                f"encode: changed since the last time: {', '.join(changed)}; all captions are embedded anew", flush=True
            )
        self.blocks.open()
        missing = self.blocks.missing(wanted)
        if missing:
            encoder = load_text_encoder(codec, best_device())
            starts = range(0, len(missing), TEXT_BLOCK)
            for start in tqdm(starts, desc="encode: captions", mininterval=1, dynamic_ncols=True, delay=2):
                keys = missing[start : start + TEXT_BLOCK]
                embedded = encoder.encode([wanted[key] for key in keys])
                self.blocks.add(keys, {"embeddings": embedded.to(torch.bfloat16)})
        self.blocks.forget(wanted)

    def _embeddings(self, texts: Sequence[str]) -> torch.Tensor:
        return self.blocks.take([_text_hash(text) for text in texts])["embeddings"]

    def places(self, rows: list[Row]) -> np.ndarray:
        """int32 [n, K]: each image's captions as rows of the texts, -1 after them."""
        import numpy as np

        places = np.full((len(rows), self.most), -1, np.int32)
        for place, row in zip(places, rows, strict=True):
            place[: len(row.captions)] = [self.place[text] for text in row.captions]
        return places

    def write(self, folder: Path, params: EncodeParams) -> list[dict[str, str]]:
        def rows(part: slice) -> dict[str, Any]:
            return {"embeddings": self._embeddings(self.distinct[part])}

        return write_shards(folder, "texts", len(self.distinct), rows, params.shard_size)

    def write_prompts(self, folder: Path) -> str:
        return write_prompts(folder, self._embeddings(self.prompts))


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


if __name__ == "__main__":
    stage.main(encode)
