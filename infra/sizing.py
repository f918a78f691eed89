"""Bytes, hours and dollars per million images of a preset, from measured rates and given prices.

    python -m infra.sizing [--preset laion_sd] [--images 1000000] [--gpu-hour 3.00] [--set key=value ...]

Bytes follow from the parameters. Rates of the CPU stages were measured (`python -m infra.bench scale`); those of a GPU
are estimates to be replaced by your own. Prices are assumptions; give those that you
pay.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.params import Params

LATENT_DOWNSCALE = 8
"""Side of an image relative to its latent, of the published autoencoders."""
ROW_BYTES = 100
"""Metadata of an image in the Parquet shards; 56 were measured with simulated captions, which compress well."""
PARTS = 2
"""Requests per row of latents: mean and standard deviation."""


@dataclass(frozen=True)
class Rates:
    """Images per second and CPU core (measured), or per GPU (estimated)."""

    ingest: float = 3_200.0
    """Images of 8x8 pixels; images of 512x512 pixels are limited by their decoding, see `decode`."""
    decode: float = 90.0
    """JPEG files of 512x512 pixels per core (estimate)."""
    validate: float = 30_000.0
    md5_mb: float = 600.0
    """Megabytes per second that DVC hashes."""
    encode_gpu: float = 150.0
    """Of the autoencoder of Stable Diffusion at 512x512, in float32 on one H100 (estimate)."""
    train_gpu: float = 60.0
    """Of Stable Diffusion 1.5 at 512x512, in bf16 on one H100 (estimate)."""


@dataclass(frozen=True)
class Prices:
    """Dollars; assumptions of the size that clouds asked in 2026."""

    gpu_hour: float = 3.0
    cpu_hour: float = 0.04
    """Of one core."""
    tb_month: float = 23.0
    """Of object storage."""
    million_requests: float = 0.4
    """Of ranges read from object storage."""


@dataclass(frozen=True)
class Line:
    """A row of the table."""

    what: str
    terabytes: float = 0.0
    hours: float = 0.0
    dollars: float = 0.0
    """Once, or per month if the row has bytes."""

    @property
    def cells(self) -> str:
        """The row in Markdown."""
        numbers = (f"{value:,.3g}" if value else "" for value in (self.terabytes * 1000, self.hours, self.dollars))
        return f"| {self.what} | {' | '.join(numbers)} |"


def lines(params: Params, images: int, image_bytes: int, rates: Rates, prices: Prices) -> list[Line]:
    """Return the rows: bytes at rest first, then stages."""
    stored = _stored(params, images, image_bytes)
    kept = [Line(what, size / 1e12, dollars=size / 1e12 * prices.tb_month) for what, size in stored.items()]
    total = sum(stored.values())
    cores = {
        "ingest: decode and hash, CPU core hours": images / min(rates.ingest, rates.decode),
        "validate, CPU core hours": images / rates.validate,
        "DVC: MD5 of all files, CPU core hours": total / 1e6 / rates.md5_mb,
    }
    gpus = {
        "encode, GPU hours (estimate)": images * (1 + params.encode.horizontal_flip) / rates.encode_gpu,
        "train: one epoch, GPU hours (estimate)": images / rates.train_gpu,
    }
    worked = [Line(what, hours=s / 3600, dollars=s / 3600 * prices.cpu_hour) for what, s in cores.items()]
    worked += [Line(what, hours=s / 3600, dollars=s / 3600 * prices.gpu_hour) for what, s in gpus.items()]
    asked = Line("train: requests of one epoch from S3", dollars=PARTS * images / 1e6 * prices.million_requests)
    return [*kept, *worked, asked]


def _stored(params: Params, images: int, image_bytes: int) -> dict[str, float]:
    from tasks.encoding.rows import BFLOAT16_BYTES, caption_bytes
    from tasks.formats.codec_info import TextInfo

    side = params.image.resolution // LATENT_DOWNSCALE
    views = 1 + params.encode.horizontal_flip
    latent = 2 * views * params.codec.autoencoder.latent_channels * side * side * BFLOAT16_BYTES
    text, second = params.codec.text, params.codec.text.second_width
    info = TextInfo(width=text.width + (second or 0), length=text.length, pooled=second)
    tokens = params.encode.captions == "tokens"
    caption = caption_bytes(info, tokens) if params.codec.conditioning == "text" else 0
    return {
        "image files (data/raw, and again in data/images)": 2.0 * images * image_bytes,
        "metadata": float(images * ROW_BYTES),
        "latents (data/latents, and again in the scratch folder)": 2.0 * images * latent,
        f"captions as {params.encode.captions}": float(images * caption * (1 if tokens else 2)),
    }


def table(found: list[Line]) -> str:
    """Return the rows as a table in Markdown."""
    return "\n".join(["| what | GB | hours | $ |", "|---|---|---|---|", *(line.cells for line in found)])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m infra.sizing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="laion_sd")
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--image-bytes", type=int, default=100_000, help="mean size of an image file")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="parameters that differ")
    for kind in (Rates, Prices):
        for field in fields(kind):
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=float, default=field.default)
    given = parser.parse_args()
    from tasks.params import Params
    from tasks.params.composition import compose

    rates = Rates(**{field.name: getattr(given, field.name) for field in fields(Rates)})
    prices = Prices(**{field.name: getattr(given, field.name) for field in fields(Prices)})
    params = Params.model_validate(compose(given.preset, given.set))
    print(table(lines(params, given.images, given.image_bytes, rates, prices)))


if __name__ == "__main__":
    main()
