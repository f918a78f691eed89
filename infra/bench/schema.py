"""The content of `bench.json`: one entry for each measured part, as JSON objects with these keys."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class Machine(TypedDict):
    """The machine and the versions of a measurement."""

    cpu: str
    cores: int | None
    threads: int
    gpu: str | None
    python: str
    torch: str


class Part(TypedDict):
    """What every part contains beside its numbers."""

    format: int
    arguments: dict[str, object]
    """The arguments of the measurement; a part with the same ones is not measured again."""
    machine: Machine
    load: list[float]
    """Runnable processes before and after the measurement, mean of a minute."""


class ThroughputRow(TypedDict):
    """A network and batch size; rates are images per second, ratios ours divided by the reference's."""

    network: str
    parameters: int
    compared: str
    peer_precision: str
    ours_precision: str
    peer_img_s: float
    ours_img_s: float
    ratio: float
    ratio_by_cpu_time: float
    ours_utilisation: float


class Throughput(TypedDict):
    """Result of `throughput`; `matmul_flops`: precision -> operations per second of a matrix product."""

    rows: list[ThroughputRow]
    matmul_flops: dict[str, float]


class Point(TypedDict):
    """A measurement during a training run; seconds of training only."""

    step: int
    seconds: float
    cpu_seconds: float
    distance: float


class Trained(TypedDict):
    """A training run of `steps` steps, measured on the way."""

    steps: int
    batch_size: int
    curve: list[Point]


class Curve(Trained):
    """A training run that is stored."""

    picture: NotRequired[str]
    """File name of the grid of samples beside it; runs of earlier versions have none."""


class QualityRun(TypedDict):
    """Both sides of one seed; the ratios are None if ours did not reach the `target` distance."""

    seed: int
    target: float
    peer: Curve
    ours: Curve
    ratio: float | None
    ratio_by_cpu_time: float | None


class Quality(TypedDict):
    """Result of `quality`; `floor` is the distance of real training images."""

    runs: list[QualityRun]
    floor: float
    ratio: float | None
    ratio_by_cpu_time: float | None


class LeverRow(TypedDict):
    """The recipe with one change: means over the seeds."""

    lever: str
    change: str
    steps: int
    distance: float
    spread: float | None
    seconds: float
    cpu_seconds: float
    picture: str | None
    """Samples of the first seed: a file in the folder `bench` of the reports."""


class Levers(TypedDict):
    """Result of `levers`."""

    rows: list[LeverRow]


class SamplingRow(TypedDict):
    """A sampler with a number of steps."""

    sampler: str
    steps: int
    samples: int
    img_s: float
    seconds_per_image: float
    distance: float


class Sampling(TypedDict):
    """Result of `sampling`."""

    rows: list[SamplingRow]
    floor: float


class EncodingTimes(TypedDict):
    """Milliseconds of a training step of each side, and their ratios to the step on stored latents."""

    stored_ms: float
    online_ms: float
    encoders_ms: float
    ratio: float
    encoders_ratio: float
    ratio_by_cpu_time: float
    encode_img_s: float
    break_even_epoch: float | None


class EncodingRow(EncodingTimes):
    """A case of `encoding`."""

    case: str
    image: int
    latent: list[int]
    parameters: int
    batch: int
    precision: str
    ratio_by_operations: float


class Encoding(TypedDict):
    """Result of `encoding`."""

    rows: list[EncodingRow]


class Startup(TypedDict):
    """Result of `startup`: medians in seconds."""

    help_seconds: float
    help_cpu_seconds: float
    first_step_seconds: float
    first_step_seconds_with_an_empty_mlflow: float
    repeats: int


# What the parts add to `Part` in the file.
class ThroughputPart(Part, Throughput):
    """Entry of `throughput` in the file."""


class QualityPart(Part, Quality):
    """Entry of `quality_*` in the file."""


class LeversPart(Part, Levers):
    """Entry of `levers` in the file."""


class SamplingPart(Part, Sampling):
    """Entry of `sampling` in the file."""


class EncodingPart(Part, Encoding):
    """Entry of `encoding` in the file."""


class StartupPart(Part, Startup):
    """Entry of `startup` in the file."""
