"""A training step on stored latents and embeddings, beside one that makes both itself: what `encode` is worth.

All sides are one run: the same network, optimizer and loop, drawing the same samples; only the stores under its
batches are exchanged, in turns. The side that encodes as it goes does what diffusers' `train_text_to_image.py` does in
each step by its defaults: it decodes and resizes the batch's pictures, whose files are in memory, tokenizes its
captions, and encodes both at once, without gradients, in training's precision. A third side has pictures and tokens
ready, which tells the encoders' own share.
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
from typing import TYPE_CHECKING, Any, Protocol

from infra.bench.contestant import Block, advance, now, take_turns
from infra.bench.inputs import Inputs, parameters, prepare
from tasks.params import Params

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from infra.bench.ours import Ours
    from models.networks.text_encoder import TextEncoder
    from tasks.training.batches import Batches

PRESET = "digits"
CASES = {
    "tiny": (
        "image.resolution=64",
        "model.block_out_channels=[32,64,128]",
        "model.attention=[false,true,true]",
    ),
    "stable_diffusion_8th": (
        "image.resolution=128",
        "codec.autoencoder.widths=[16,32,64,64]",
        "codec.autoencoder.layers_per_block=2",
        "codec.text.width=96",
        "codec.text.layers=12",
        "codec.text.length=77",
        "model.block_out_channels=[40,80,160,160]",
        "model.attention=[true,true,true,false]",
        "model.layers_per_block=2",
        "model.attention_head_dim=null",
        "model.heads=1",
        "train.batch_size=64",
        "train.gradient_accumulation=4",
    ),
}
"""What the small presets train at 64x64 by the autoencoder and text encoder that are the default; and Stable Diffusion
1.5 with an eighth of its widths and heads and a quarter of its sides, which leaves the proportions of its parts. The
batches are those of the presets `laion_sd_tiny` and `laion_sd`."""
COMMON = (
    "conditioning=text",
    "ingest.caption_templates=['a handwritten {}', 'the digit {}', 'a picture of the number {}']",
    "image.channels=3",
    "codec.kind=autoencoder",
    # How well they are trained is the same to the clock.
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
    """What to measure: `cases` are names in `CASES`, none means all of them. `photos` is a folder, zip or tar of
    captioned pictures; without one it is the digits, drawn as large and as colourful, which take as long to encode."""

    work: Path
    photos: Path | None
    cases: tuple[str, ...]
    rounds: int
    block_seconds: float
    overrides: tuple[str, ...] = ()


def measure(plan: Plan) -> dict[str, Any]:
    """One row for each case: milliseconds of a step of each side, their ratios, the epoch that breaks even."""
    source = [*PHOTOS, f"download.path={plan.photos}"] if plan.photos else []
    sets = {
        case: parameters(PRESET, None, *COMMON, *CASES[case], *source, *plan.overrides) for case in plan.cases or CASES
    }
    # Before anything is trained: from then on the process keeps what memory it had.
    inputs = {case: prepare(plan.work, params) for case, params in sets.items()}
    rows = []
    for case, params in sets.items():
        rows.append({"case": case, **_row(plan, params, inputs[case])})
        print(f"encoding: {told(rows[-1])}", flush=True)
    return {"rows": rows}


def told(row: dict[str, Any]) -> str:
    """A row in a sentence."""
    even = row["break_even_epoch"]
    return (
        f"{row['case']}: {row['stored_ms']:.1f} ms a step on what is stored, {row['online_ms']:.1f} ms with "
        f"encoding in it, {row['ratio']:.2f} times as long ({row['ratio_by_cpu_time']:.2f} by CPU time; "
        f"{row['encoders_ratio']:.2f} where pictures and tokens are ready); "
        f"encoding once breaks even {f'in epoch {even:.2f}' if even is not None else 'never'}"
    )


def _row(plan: Plan, params: Params, inputs: Inputs) -> dict[str, Any]:
    from infra.bench.ours import Ours
    from tasks.training.batches import Batches

    os.environ["AFTERIMAGE_SCRATCH"] = str(plan.work / "scratch")
    ours = Ours(params, inputs)
    stored = ours.run.batches
    assert isinstance(stored, Batches), "there are no buckets but the square"
    encoders = Encoders(params, inputs, stored)
    sides = {
        "stored": stored,
        "online": encoders.under(stored, Pictures(params, inputs), Captions(inputs, encoders.text)),
        "encoders": encoders.under(stored, Pixels(params, inputs), Tokens(inputs, encoders.text)),
    }
    advances = {side: partial(_advance_on, batches, ours, params) for side, batches in sides.items()}
    blocks = take_turns(advances, plan.rounds, plan.block_seconds, "encoding")
    once = _encode_once(params, inputs)
    return {
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
    return advance(ours, steps, params)


def compared(stored: list[Block], online: list[Block], encoders: list[Block], once: Block) -> dict[str, Any]:
    """Medians over the rounds; `once` is the stage `encode` over all images.

    To encode an image once costs as much as training saves on it in `break_even_epoch` epochs; None where it saves
    nothing.
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
    """Of a step with and without the autoencoder in it, counted on tensors without content."""
    import torch

    from models import autoencoder_training as training
    from models.flops import forward_flops
    from models.networks.network import build
    from tasks.formats.latents import InputSpec
    from tasks.training.run import network_config

    wanted, image = params.codec.autoencoder, params.image
    shape = training.AutoencoderConfig(image.channels, wanted.latent_channels, wanted.widths, wanted.layers_per_block)
    side, width = image.resolution // 2 ** (len(wanted.widths) - 1), params.codec.text.width
    spec = InputSpec(wanted.latent_channels, side, "text", text_width=width)
    with torch.device("meta"):
        autoencoder, network = training.build(shape), build(network_config(spec, params.model))
        autoencoder.forward = lambda pixels: autoencoder.encode(pixels).latent_dist.mean
        encode = forward_flops(autoencoder, torch.empty(1, image.channels, image.resolution, image.resolution))
        text, t = torch.empty(1, params.codec.text.length, width), torch.zeros(1, dtype=torch.int64)
        step = 3 * forward_flops(network, torch.empty(1, wanted.latent_channels, side, side), t, text)
    return 1 + encode / step


def _encode_once(params: Params, inputs: Inputs) -> Block:
    """The stage as it runs on data that it has never seen."""
    from tasks.encode import encode
    from tasks.formats import latents

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
    """An autoencoder and a text encoder in training's precision, and what they put in the place of stored columns."""

    def __init__(self, params: Params, inputs: Inputs, stored: Batches) -> None:
        import torch

        from models.networks.autoencoder import load_autoencoder
        from models.networks.text_encoder import load_text_encoder
        from tasks.formats import latents

        weights = torch.bfloat16 if params.train.precision == "bf16" else torch.float32
        self.device = stored.device
        self.autoencoder = load_autoencoder(inputs.codec / "vae", str(self.device)).to(weights)
        [self.text] = load_text_encoder(inputs.codec, str(self.device)).towers
        self.text.model.to(weights)
        self.own = latents.load_latents(inputs.latents, "train")

    def under(self, stored: Batches, pixels: Drawn, tokens: Drawn) -> Batches:
        """The same batches as `stored`, their latents and embeddings made as they are drawn."""
        batches = copy.copy(stored)
        batches.store = EncodedOnline(self, pixels)
        batches.texts = EmbeddedOnline(self, tokens)
        return batches


class EncodedOnline:
    """A split as a `Store`: an autoencoder makes `mean` and `std` of pictures whenever they are asked for."""

    where = "encoded online"

    def __init__(self, encoders: Encoders, pixels: Drawn) -> None:
        from tasks.formats import latents

        own = encoders.own
        assert own.mean is not None and own.std is not None and own.captions is not None, "text to image in latents"
        self.autoencoder, self.pixels, self.count = encoders.autoencoder, pixels, own.count
        self.captions = latents.as_tensor(own.captions).to(encoders.device)
        columns = {"mean": own.mean, "std": own.std, "captions": own.captions}
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(column.shape[1:]) for name, column in columns.items()}  # type: ignore[attr-defined]

    def gather(self, rows: Tensor, following: Callable[[], Tensor] | None) -> dict[str, Tensor]:
        from models.networks.autoencoder import encode

        del following
        mean, std = encode(self.autoencoder, self.pixels(rows))
        return {"mean": mean[:, None], "std": std[:, None], "captions": self.captions[rows]}


class EmbeddedOnline:
    """All captions as a `Store`: a text encoder makes `embeddings` of them whenever they are asked for."""

    where = "embedded online"

    def __init__(self, encoders: Encoders, tokens: Drawn) -> None:
        text = encoders.text
        self.model, self.device, self.tokens, self.count = text.model, encoders.device, tokens, len(tokens)
        self.shapes: dict[str, tuple[int, ...]] = {"embeddings": (text.length, text.model.config.hidden_size)}

    def gather(self, rows: Tensor, following: Callable[[], Tensor] | None) -> dict[str, Tensor]:
        import torch

        del following
        with torch.inference_mode():
            return {"embeddings": self.model(self.tokens(rows).to(self.device)).last_hidden_state}


class Drawn(Protocol):
    """What an encoder reads: rows int64 [B] -> pictures uint8 [B, C, S, S], or token ids int64 [B, L] of captions."""

    def __call__(self, rows: Tensor) -> Any: ...

    def __len__(self) -> int: ...


class Pictures:
    """The training images' files in memory, decoded and resized whenever they are asked for."""

    def __init__(self, params: Params, inputs: Inputs) -> None:
        from tasks.pictures.images import read_columns

        table = read_columns(inputs.images, ["key", "split", "image", "width", "height"]).sort_by("key")
        self.files = [row for row in table.to_pylist() if row["split"] == "train"]
        self.form, self.channels = (params.image.resolution, params.image.resolution), params.image.channels

    def __call__(self, rows: Tensor) -> np.ndarray:
        import numpy as np

        from tasks.pictures.decoding import ingested

        drawn = [self.files[row] for row in rows.tolist()]
        pixels = (ingested(its["image"], its["width"] * its["height"], self.form, self.channels) for its in drawn)
        return np.stack(list(pixels))

    def __len__(self) -> int:
        return len(self.files)


class Pixels:
    """The training images, decoded and resized beforehand."""

    def __init__(self, params: Params, inputs: Inputs) -> None:
        from tasks.pictures.images import load_pixels

        self.pixels = load_pixels(inputs.images, "train", params.image).pixels

    def __call__(self, rows: Tensor) -> np.ndarray:
        return self.pixels[rows.numpy()]

    def __len__(self) -> int:
        return len(self.pixels)


class Captions:
    """All captions, tokenized whenever they are asked for."""

    def __init__(self, inputs: Inputs, text: TextEncoder) -> None:
        from tasks.pictures.images import read_columns

        captions = read_columns(inputs.images, ["captions"]).column(0).to_pylist()
        self.texts = sorted({one for several in captions for one in several})
        self.tokenized = text.token_ids

    def __call__(self, rows: Tensor) -> Tensor:
        return self.tokenized([self.texts[row] for row in rows.tolist()])

    def __len__(self) -> int:
        return len(self.texts)


class Tokens:
    """All captions, tokenized beforehand."""

    def __init__(self, inputs: Inputs, text: TextEncoder) -> None:
        self.tokens = text.token_ids(Captions(inputs, text).texts)

    def __call__(self, rows: Tensor) -> Tensor:
        return self.tokens[rows]

    def __len__(self) -> int:
        return len(self.tokens)
