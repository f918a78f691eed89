"""Compare a training step on stored latents and embeddings with one that encodes online: the gain of `encode`.

All sides are one run with the same network, optimizer, loop and samples; only the stores of its batches are exchanged,
in turns. The online side does what diffusers' `train_text_to_image.py` does in each step by default: it decodes and
resizes the images of the batch (their files are in memory), tokenizes the captions, and encodes both without gradients
in the training precision. A third side has decoded images and tokens ready, which isolates the cost of the encoders.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from infra.bench import cases
from infra.bench.clock import Block, advance, now, take_turns
from infra.bench.inputs import Inputs, parameters, prepare
from infra.bench.ours import Ours
from models import autoencoder_training as training
from models.flops import forward_flops
from models.networks.autoencoder import encode as encode_pixels
from models.networks.autoencoder import load_autoencoder
from models.networks.network import build
from models.networks.text_encoder import load_text_encoder
from tasks.encode import encode
from tasks.formats import latents
from tasks.formats.latents import InputSpec
from tasks.pictures.decoding import decode_resized
from tasks.pictures.images import load_pixels, read_columns
from tasks.training.batches import Batches
from tasks.training.run import network_config

if TYPE_CHECKING:
    from torch import Tensor

    from infra.bench.schema import Encoding, EncodingRow, EncodingTimes
    from models.networks.text_encoder import TextEncoder
    from tasks.params import Params

PRESET = "digits"
COMMON = (
    "conditioning=text",
    "ingest.caption_templates=['a handwritten {}', 'the digit {}', 'a picture of the number {}']",
    "image.channels=3",
    "codec.kind=autoencoder",
    # The quality of the encoders does not affect the time.
    "codec.autoencoder.steps=10",
    "codec.text.steps=10",
    "train.steps=1000000",
)
PHOTOS = (
    "download.source=folder",
    "validate.min_images=100",
    "validate.min_images_per_class=0",
    "validate.max_aspect_ratio=4.0",
    "validate.max_quarantined_fraction=0.1",
)


@dataclass(frozen=True)
class Plan:
    """What to measure.

    `cases` are names in `cases.ENCODING`, none means all of them. `photos` is a folder, zip or tar of captioned images;
    without one the digits are used, resized to the same resolution in RGB, which take as long to encode.
    """

    work: Path
    photos: Path | None
    cases: tuple[str, ...]
    rounds: int
    block_seconds: float
    overrides: tuple[str, ...] = ()


def measure(plan: Plan) -> Encoding:
    """One row for each case: milliseconds of a step of each side, their ratios, the break-even epoch."""
    source = [*PHOTOS, f"download.path={plan.photos}"] if plan.photos else []
    sets = {
        case: parameters(PRESET, None, *COMMON, *cases.ENCODING[case], *source, *plan.overrides)
        for case in plan.cases or cases.ENCODING
    }
    # All inputs before the first training: a process keeps the memory that it has once allocated.
    inputs = {case: prepare(plan.work, params) for case, params in sets.items()}
    rows: list[EncodingRow] = []
    for case, params in sets.items():
        rows.append(_row(case, plan, params, inputs[case]))
        print(f"encoding: {sentence(rows[-1])}", flush=True)
    return {"rows": rows}


def sentence(row: EncodingRow) -> str:
    """A row as a sentence."""
    even = row["break_even_epoch"]
    return (
        f"{row['case']}: {row['stored_ms']:.1f} ms per step on stored latents, {row['online_ms']:.1f} ms with online "
        f"encoding, {row['ratio']:.2f} times as long ({row['ratio_by_cpu_time']:.2f} by CPU time; "
        f"{row['encoders_ratio']:.2f} with decoded images and tokens); "
        f"encoding once breaks even {f'in epoch {even:.2f}' if even is not None else 'never'}"
    )


def _row(case: str, plan: Plan, params: Params, inputs: Inputs) -> EncodingRow:
    os.environ["AFTERIMAGE_SCRATCH"] = str(plan.work / "scratch")
    ours = Ours(params, inputs)
    stored = ours.run.batches
    assert isinstance(stored, Batches), "only square images"
    encoders = Encoders(params, inputs, stored)
    sides = {
        "stored": stored,
        "online": encoders.replacing(stored, Images(params, inputs), Captions(inputs, encoders.text)),
        "encoders": encoders.replacing(stored, Pixels(params, inputs), Tokens(inputs, encoders.text)),
    }
    advances = {side: partial(_advance_on, batches, ours, params) for side, batches in sides.items()}
    blocks = take_turns(advances, plan.rounds, plan.block_seconds, "encoding")
    once = _encode_once(params, inputs)
    return {
        "case": case,
        "image": params.image.resolution,
        "latent": list(stored.shape),
        "parameters": sum(weight.numel() for weight in ours.averaged().values()),
        "batch": params.train.batch_size,
        "precision": params.train.precision,
        "ratio_by_operations": round(ratio_by_operations(params), 3),
        **compared(blocks["stored"], blocks["online"], blocks["encoders"], once),
    }


def _advance_on(batches: Batches, ours: Ours, params: Params, steps: int) -> Block:
    ours.run.batches = batches
    return advance(ours, steps, params.train.batch_size)


def compared(stored: list[Block], online: list[Block], encoders: list[Block], once: Block) -> EncodingTimes:
    """Medians over the rounds; `once` is the stage `encode` on all images.

    Encoding an image once costs as much as training on stored latents saves in `break_even_epoch` epochs; None if it
    saves nothing.
    """
    pairs = list(zip(stored, online, strict=True))
    saved = median(b.seconds / b.images - a.seconds / a.images for a, b in pairs)
    return {
        "stored_ms": _milliseconds(stored),
        "online_ms": _milliseconds(online),
        "encoders_ms": _milliseconds(encoders),
        "ratio": _ratio(stored, online),
        "encoders_ratio": _ratio(stored, encoders),
        "ratio_by_cpu_time": round(median((b.cpu_seconds / b.steps) / (a.cpu_seconds / a.steps) for a, b in pairs), 3),
        "encode_img_s": round(once.images / once.seconds, 1),
        "break_even_epoch": round(once.seconds / once.images / saved, 2) if saved > 0 else None,
    }


def _milliseconds(blocks: list[Block]) -> float:
    return round(median(1000 * block.seconds / block.steps for block in blocks), 2)


def _ratio(stored: list[Block], other: list[Block]) -> float:
    return round(median((b.seconds / b.steps) / (a.seconds / a.steps) for a, b in zip(stored, other, strict=True)), 3)


def ratio_by_operations(params: Params) -> float:
    """Ratio of a step with the autoencoder to one without it, by operations counted on meta tensors."""
    wanted, image = params.codec.autoencoder, params.image
    shape = training.AutoencoderConfig(image.channels, wanted.latent_channels, wanted.widths, wanted.layers_per_block)
    side, width = image.resolution // 2 ** (len(wanted.widths) - 1), params.codec.text.width
    spec = InputSpec(wanted.latent_channels, side, "text", text_width=width)
    with torch.device("meta"):
        autoencoder, network = training.build(shape), build(network_config(spec, params.model))
        autoencoder.forward = lambda pixels: autoencoder.encode(pixels).latent_dist.mean
        encoding = forward_flops(autoencoder, torch.empty(1, image.channels, image.resolution, image.resolution))
        text, t = torch.empty(1, params.codec.text.length, width), torch.zeros(1, dtype=torch.int64)
        step = 3 * forward_flops(network, torch.empty(1, wanted.latent_channels, side, side), t, text)
    return 1 + encoding / step


def _encode_once(params: Params, inputs: Inputs) -> Block:
    """Run the stage without its cache of earlier results."""
    before = os.environ["AFTERIMAGE_SCRATCH"]
    with tempfile.TemporaryDirectory(prefix="afterimage-bench-") as folder:
        os.environ["AFTERIMAGE_SCRATCH"] = folder
        try:
            began, cpu_began = now()
            encode(inputs.images, inputs.accepted, inputs.codec, Path(folder) / "latents", params.encode)
            ended, cpu_ended = now()
        finally:
            os.environ["AFTERIMAGE_SCRATCH"] = before
        images = sum(split.count for split in latents.read_index(Path(folder) / "latents").splits.values())
    return Block(1, images, ended - began, cpu_ended - cpu_began)


class Encoders:
    """An autoencoder and a text encoder in the training precision, and the batches that they encode online."""

    def __init__(self, params: Params, inputs: Inputs, stored: Batches) -> None:
        weights = torch.bfloat16 if params.train.precision == "bf16" else torch.float32
        self.device = stored.device
        self.autoencoder = load_autoencoder(inputs.codec / "vae", str(self.device)).to(weights)
        [self.text] = load_text_encoder(inputs.codec, str(self.device)).towers
        self.text.model.to(weights)
        self.own = latents.load_latents(inputs.latents, "train")

    def replacing(self, stored: Batches, pixels: PixelSource, tokens: TokenSource) -> Batches:
        """The batches of `stored`, with latents and embeddings that are encoded when a batch is drawn."""
        batches = copy.copy(stored)
        batches.store = EncodedOnline(self, pixels)
        batches.texts = EmbeddedOnline(self, tokens)
        return batches


class EncodedOnline:
    """A split as a `Store` that encodes images to `mean` and `std` on access."""

    where = "encoded online"

    def __init__(self, encoders: Encoders, pixels: PixelSource) -> None:
        own = encoders.own
        assert own.mean is not None and own.std is not None and own.captions is not None, (
            "the data set has captions and latents"
        )
        self.autoencoder, self.pixels, self.count = encoders.autoencoder, pixels, own.count
        self.listed, self.captions = own.captions, latents.as_tensor(own.captions).to(encoders.device)
        columns = {"mean": own.mean, "std": own.std, "captions": own.captions}
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(column.shape[1:]) for name, column in columns.items()}  # type: ignore[attr-defined]

    def gather(self, rows: Tensor, following: Callable[[], Tensor] | None) -> dict[str, Tensor]:
        """Encode the images of `rows` (int64 [B])."""
        del following
        mean, std = encode_pixels(self.autoencoder, self.pixels(rows))
        return {"mean": mean[:, None], "std": std[:, None], "captions": self.captions[rows]}

    def on_host(self, name: str, rows: Tensor) -> np.ndarray:
        """Read the captions of `rows`; latents exist on the device only."""
        assert name == "captions", name
        return np.asarray(self.listed[rows.cpu().numpy()])


class EmbeddedOnline:
    """All captions as a `Store` that encodes them to `embeddings` on access."""

    where = "embedded online"

    def __init__(self, encoders: Encoders, tokens: TokenSource) -> None:
        text = encoders.text
        self.model, self.device, self.tokens, self.count = text.model, encoders.device, tokens, len(tokens)
        self.shapes: dict[str, tuple[int, ...]] = {"embeddings": (text.length, text.model.config.hidden_size)}

    def gather(self, rows: Tensor, following: Callable[[], Tensor] | None) -> dict[str, Tensor]:
        """Encode the captions of `rows` (int64 [B])."""
        del following
        with torch.inference_mode():
            return {"embeddings": self.model(self.tokens(rows).to(self.device)).last_hidden_state}

    def on_host(self, name: str, rows: Tensor) -> np.ndarray:
        """Encode the captions of `rows`, copied to the CPU."""
        return self.gather(rows, None)[name].float().cpu().numpy()


class PixelSource(Protocol):
    """Rows int64 [B] -> images uint8 [B, C, S, S]."""

    def __call__(self, rows: Tensor) -> np.ndarray: ...

    def __len__(self) -> int: ...


class TokenSource(Protocol):
    """Rows int64 [B] -> token ids int64 [B, L] of captions."""

    def __call__(self, rows: Tensor) -> Tensor: ...

    def __len__(self) -> int: ...


class Images:
    """The files of the training images in memory, decoded and resized on access."""

    def __init__(self, params: Params, inputs: Inputs) -> None:
        table = read_columns(inputs.images, ["key", "split", "image", "width", "height"]).sort_by("key")
        self.files = [row for row in table.to_pylist() if row["split"] == "train"]
        self.shape, self.channels = (params.image.resolution, params.image.resolution), params.image.channels

    def __call__(self, rows: Tensor) -> np.ndarray:
        chosen = [self.files[row] for row in rows.tolist()]
        pixels = (
            decode_resized(file["image"], file["width"] * file["height"], self.shape, self.channels) for file in chosen
        )
        return np.stack(list(pixels))

    def __len__(self) -> int:
        return len(self.files)


class Pixels:
    """The training images, decoded and resized in advance."""

    def __init__(self, params: Params, inputs: Inputs) -> None:
        self.pixels = load_pixels(inputs.images, "train", params.image).pixels

    def __call__(self, rows: Tensor) -> np.ndarray:
        return self.pixels[rows.numpy()]

    def __len__(self) -> int:
        return len(self.pixels)


class Captions:
    """All captions, tokenized on access."""

    def __init__(self, inputs: Inputs, text: TextEncoder) -> None:
        captions = read_columns(inputs.images, ["captions"]).column(0).to_pylist()
        self.texts = sorted({one for several in captions for one in several})
        self.tokenized = text.token_ids

    def __call__(self, rows: Tensor) -> Tensor:
        return self.tokenized([self.texts[row] for row in rows.tolist()])

    def __len__(self) -> int:
        return len(self.texts)


class Tokens:
    """All captions, tokenized in advance."""

    def __init__(self, inputs: Inputs, text: TextEncoder) -> None:
        self.tokens = text.token_ids(Captions(inputs, text).texts)

    def __call__(self, rows: Tensor) -> Tensor:
        return self.tokens[rows]

    def __len__(self) -> int:
        return len(self.tokens)
