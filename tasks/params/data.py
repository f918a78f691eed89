"""Parameters of the data: the sections `download`, `ingest`, `validate`, `image` and `encode`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tasks.params.control import ControlParams
from tasks.params.section import NO_PATH, Fraction, PositiveInt, Section, Workers, count_of

FROM_ENVIRONMENT = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*")
"""Refers to the environment variable that contains an address, so that the address is not written to params.yaml."""


class HubParams(Section):
    """A data set on the Hugging Face Hub."""

    repo: str | None = None
    """Such as 'uoft-cs/cifar10'."""
    revision: str | None = None
    """A commit hash. For a branch or tag, the error names the commit to pin."""
    files: str = "*.parquet"
    """Pattern of the files to download; `*` matches any characters, including '/'."""


class S3Params(Section):
    """Access to `s3://` addresses; credentials are read from the environment or the AWS profile."""

    endpoint_url: str | None = None
    """Address of an S3-compatible server; null uses AWS_ENDPOINT_URL if it is set, else Amazon S3."""
    anonymous: bool = False
    """Send requests without credentials, as public buckets allow."""
    connections: PositiveInt = 8
    """Concurrent requests."""


class ColumnsParams(Section):
    """Columns of tables on the hub; a column that is null or empty is found by its type and its usual names."""

    image: str | None = None
    """Column with the images."""
    label: str | None = None
    """Such as 'label', or 'attributes[20]' for one element of a list column."""
    captions: tuple[str, ...] = Field(default=(), strict=False)
    """Columns with captions; an image has those of all."""
    classes: tuple[str, ...] = Field(default=(), strict=False)
    """Class names in the order of the labels, if the tables do not contain them."""


class LaionParams(Section):
    """Filters on a table of image addresses, and options of the download. A filter that is null is off."""

    max_images: PositiveInt = 10_000
    """Most rows to download: the first that pass the filters."""
    min_side: PositiveInt | None = 256
    """Least shorter side in pixels, as published in the table."""
    max_aspect_ratio: Annotated[float, Field(ge=1)] | None = 2.0
    """Largest ratio of the longer to the shorter side, as published in the table."""
    min_similarity: float | None = 0.28
    """Least CLIP similarity of image and caption, as published in the table."""
    max_watermark: Fraction | None = 0.5
    """Largest `pwatermark`, the published probability of a watermark."""
    max_unsafe: Fraction | None = 0.1
    """Largest `punsafe`; a row without it counts as unsafe."""
    languages: tuple[str, ...] = Field(default=(), strict=False)
    """Such as ['en', 'de']; empty accepts all. The English release has no such column."""
    shorter_side: PositiveInt | None = None
    """Larger images are resized to this shorter side and saved as JPEG; null keeps the published bytes."""
    min_success_rate: Fraction = 0.5
    """Least fraction of addresses that yield an image; 30 to 40 per cent are dead."""
    processes: PositiveInt = 2
    """Processes that download."""
    threads: PositiveInt = 16
    """Concurrent downloads in each process."""
    shard_size: PositiveInt = 1000
    """Addresses per shard; a complete shard is not downloaded again."""
    seconds_per_wait: PositiveInt = 10
    """Seconds without an answer after which an attempt ends."""
    seconds_per_image: PositiveInt = 30
    """Longest time for one image, in seconds."""
    retries: Annotated[int, Field(ge=0)] = 1
    """Further attempts for an address that fails."""
    max_image_bytes: PositiveInt = 20_000_000
    """Largest image file."""
    max_pixels: PositiveInt = 50_000_000
    """Largest number of pixels of an image."""
    user_agent: str | None = None
    """User-agent token that sites can use to identify and forbid this download."""
    distributor: Literal["multiprocessing", "pyspark", "ray"] = "multiprocessing"
    """Where the processes run: on this machine, or on a Spark or Ray cluster."""
    subjob_size: PositiveInt = 1000
    """Shards per job; read by distributor `pyspark`."""
    proxy_host: str = "127.0.0.1"
    """Address at which worker machines reach the filtering proxy of this machine."""


class DownloadParams(Section):
    """The source of the images."""

    source: Literal["digits", "cifar10", "folder", "hub", "laion"]
    """Where the images come from; see docs/data.md."""
    path: str = NO_PATH
    """Local folder, zip or tar of source `folder`, or tables of source `laion`; a DVC dependency."""
    url: str | None = None
    """http(s) or s3:// address of source `folder` (an s3:// prefix ends in '/'), or a mirror for `cifar10`.
    `env:NAME` reads an http(s) address, such as a signed one, from the environment variable NAME at run time. User
    name and password of a host are read from ~/.netrc."""
    sha256: str | None = None
    """Expected SHA-256 of the file at `url`, or of the listing of an s3:// prefix, which the stage prints."""
    allow_private_addresses: bool = False
    """Allow addresses that resolve to private networks."""
    max_bytes: PositiveInt = 20_000_000_000
    """Largest download."""
    timeout_seconds: PositiveInt = 3600
    """Longest time for a download."""
    licence: str = "unknown"
    """Licence of the images, recorded with them."""
    images: PositiveInt | None = None
    """Number of images that the source must contain; null accepts any."""
    s3: S3Params = S3Params()
    hub: HubParams = HubParams()
    columns: ColumnsParams = ColumnsParams()
    laion: LaionParams = LaionParams()

    @model_validator(mode="after")
    def _check(self) -> DownloadParams:
        local, remote, named = self.path != NO_PATH, self.url is not None, self.hub.repo is not None
        if self.source == "folder" and local == remote:
            raise ValueError(
                "download.source is 'folder', so set either download.path (a local folder, zip or tar) "
                "or download.url, and not both"
            )
        if self.source == "hub" and not named:
            raise ValueError("download.source is 'hub', so set download.hub.repo, such as 'uoft-cs/cifar10'")
        if self.source == "laion" and local == named:
            raise ValueError(
                "download.source is 'laion', so set either download.path (local Parquet tables of addresses) "
                "or download.hub.repo, and not both"
            )
        if self.source not in ("folder", "laion") and local:
            raise ValueError(
                f"download.path is only read by download.source 'folder' and 'laion'; set it back to '{NO_PATH}'"
            )
        if self.source in ("digits", "hub", "laion") and remote:
            raise ValueError(f"download.url is not read by download.source '{self.source}'; remove it")
        if self.source == "folder" and remote and self.sha256 is None and not self._is_prefix():
            raise ValueError("download.url needs download.sha256, so that every run downloads the same bytes")
        if self.sha256 is not None and not (self.source == "folder" and remote):
            raise ValueError("download.sha256 is only read with source 'folder' and download.url; set it to null")
        kinds = ("http://", "https://", "s3://") if self.source == "folder" else ("http://", "https://")
        if self.url is not None and not self.url.startswith(kinds) and not FROM_ENVIRONMENT.fullmatch(self.url):
            raise ValueError(
                f"download.url must begin with {' or '.join(kinds)}, or be env:NAME of an environment variable"
            )
        return self

    def _is_prefix(self) -> bool:
        return self.url is not None and self.url.startswith("s3://") and self.url.endswith("/")

    @model_validator(mode="after")
    def _check_parts(self) -> DownloadParams:
        """Refuse values that the chosen source does not read: they would be ignored."""
        if not (self.url or "").startswith("s3://") and self.s3 != S3Params():
            raise ValueError("download.s3 is only read with an s3:// address in download.url; reset it")
        if self.source not in ("hub", "laion") and self.hub != HubParams():
            raise ValueError("download.hub is only read by download.source 'hub' and 'laion'; reset it")
        if self.source != "hub" and (self.columns != ColumnsParams() or self.images is not None):
            raise ValueError("download.columns and download.images are only read by download.source 'hub'; reset them")
        if self.source != "laion" and self.laion != LaionParams():
            raise ValueError("download.laion is only read by download.source 'laion'; reset it")
        return self


Distributor = Literal["local", "ray"]


def _check_cluster(section: str, distributor: Distributor, ray_address: str | None) -> None:
    if ray_address is not None and distributor != "ray":
        raise ValueError(f"{section}.ray_address is only read with {section}.distributor 'ray'; set it to null")


class IngestParams(Section):
    """How images are brought into one format and split into `train` and `test`."""

    shards: Literal[1, 16, 256, 4096]
    """Number of Parquet shards; an image's shard is given by the first digits of its key's hash. With 4096 the stage
    needs 0.5 GB more, and every shard holds 1 in 4096 images; for tens of millions of images."""
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)]
    """Fraction of images assigned to `test` by the hash of their key, if the source publishes no split."""
    caption_templates: tuple[str, ...] = Field(default=(), strict=False)
    """Captions made from the class name, such as 'a photo of a {}', if the source has none."""
    max_pixels: PositiveInt = 50_000_000
    """Largest number of pixels of an image; larger ones go to quarantine."""
    max_image_bytes: PositiveInt = 50_000_000
    """Largest image file in bytes; larger ones go to quarantine."""
    workers: Workers = "auto"
    """Processes that decode; the output does not depend on their number."""
    distributor: Distributor = "local"
    """Where these processes run: on this machine, or on a Ray cluster (`make install EXTRA=ray`)."""
    ray_address: str | None = None
    """Address of a running Ray cluster, such as '10.0.0.5:6379'; null uses RAY_ADDRESS if it is set, else the stage
    starts a cluster on this machine."""

    @property
    def worker_count(self) -> int:
        """The number of workers on this machine."""
        return count_of(self.workers)

    @model_validator(mode="after")
    def _check(self) -> IngestParams:
        for template in self.caption_templates:
            if template.count("{}") != 1:
                raise ValueError(f"ingest.caption_templates needs exactly one '{{}}' in each, not {template!r}")
        _check_cluster("ingest", self.distributor, self.ray_address)
        return self


Check = Literal[
    "schema", "rows", "keys", "size", "aspect", "mode", "splits", "hashes", "licence", "origin", "safety",
    "decodability", "duplicates", "leaks", "near_duplicates", "near_leaks", "labels", "unlabelled",
    "class_size", "drift", "captions", "captions_read", "caption_length", "caption_characters", "caption_script",
]  # fmt: skip
Script = Literal[
    "LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "GEORGIAN", "HEBREW", "ARABIC", "DEVANAGARI", "BENGALI", "TAMIL", "THAI",
    "HANGUL", "HIRAGANA", "KATAKANA", "CJK",
]  # fmt: skip


class ValidateParams(Section):
    """Limits of the data checks."""

    min_images: PositiveInt
    """Least number of images."""
    min_side: PositiveInt | None = None
    """Least shorter side of an image in pixels; null is `image.resolution`, below which images are enlarged."""
    max_aspect_ratio: Annotated[float, Field(ge=1)]
    """Largest ratio of the longer to the shorter side of an image."""
    max_quarantined_fraction: Fraction
    """Largest share of input files that may be in quarantine."""
    min_images_per_class: Annotated[int, Field(ge=0)]
    """Least number of images of each class."""
    max_caption_characters: PositiveInt = 2000
    """Largest length of a caption."""
    caption_scripts: tuple[Script, ...] = Field(default=("LATIN",), strict=False)
    """Writing systems that captions may use, by their names in Unicode."""
    max_duplicate_fraction: Fraction = 0.05
    """Largest share of images that are equal to another one."""
    near_duplicate_bits: Annotated[int, Field(ge=0, le=6)] = 3
    """Images whose 64-bit perceptual hashes differ in at most this many bits are near duplicates."""
    max_label_drift: Fraction = 0.1
    """Largest total variation distance of the class frequencies from those in `baseline`."""
    baseline: str = "tasks/presets/accepted_digits.json"
    """Copy of an earlier version's data/accepted.json, kept in Git; the check `drift` compares with it."""
    warn_only: tuple[Check, ...] = Field(
        default=("near_duplicates", "near_leaks", "unlabelled", "drift", "captions_read", "caption_script"),
        strict=False,
    )
    """Checks that only warn; a failure of any other check stops the chain."""


class ImageParams(Section):
    """Images of the model, uint8 [channels, resolution, resolution]."""

    resolution: PositiveInt
    """Height and width in pixels."""
    channels: Literal[1, 3]
    """1 is grey, 3 is RGB."""


class EncodeParams(Section):
    """How images become model inputs."""

    shard_size: PositiveInt = 16384
    """Images per safetensors shard."""
    horizontal_flip: bool = False
    """Also encode each image mirrored; `train.horizontal_flip` draws one of the two. For latents only, because pixels
    are mirrored when a batch is drawn."""
    buckets: tuple[Annotated[float, Field(ge=0.25, le=4)], ...] = Field(default=(), strict=False)
    """Aspect ratios (width / height) besides the square. Each image is cropped to the nearest one, at the area of
    `image.resolution` squared; an empty list crops every image to the square."""
    bucket_multiple: PositiveInt = 64
    """The sides of buckets are multiples of this number of pixels."""
    workers: Workers = "auto"
    """Threads that decode and, on a CPU, encode; with distributor 'ray' processes that do both. The output does not
    depend on their number."""
    distributor: Distributor = "local"
    """Where images become latents: on this machine, or on a Ray cluster (`make install EXTRA=ray`)."""
    ray_address: str | None = None
    """As `ingest.ray_address`."""
    precision: Literal["no", "bf16"] = "no"
    """Precision of autoencoder and text encoders: `no` is float32. Latents and embeddings are stored in bfloat16. With
    captions 'tokens' training encodes them in this precision, too."""
    leave_out: tuple[str, ...] = Field(default=(), strict=False)
    """Classes whose images are not encoded, such as the subject of DreamBooth, which the base must not have seen."""
    captions: Literal["embeddings", "tokens"] = "embeddings"
    """How captions are stored: their embeddings, or their token ids, which training encodes again in each batch.
    Tokens take a few hundred bytes a caption, embeddings of Stable Diffusion 118,000."""
    control: ControlParams | None = None
    """Control maps for a ControlNet; null makes none."""

    @property
    def worker_count(self) -> int:
        """The number of workers on this machine."""
        return count_of(self.workers)

    @model_validator(mode="after")
    def _check(self) -> EncodeParams:
        _check_cluster("encode", self.distributor, self.ray_address)
        return self
