"""A split that does not fit in memory lies in a file, and no output differs."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from tasks.codec import codec
from tasks.ingest import ingest
from tasks.params import AutoencoderParams, CodecParams, ImageParams
from tasks.pictures import images
from tasks.runtime.errors import StageError
from tests.support import judge_inputs
from tests.support.data_inputs import contents, folder_params, ingest_params, picture, write_tree

BRIEF = judge_inputs.PARAMS.model_copy(update={"classifier_steps": 3, "clip_steps": 3})
CODEC = CodecParams(
    kind="autoencoder",
    conditioning="label",
    autoencoder=AutoencoderParams(widths=(8, 16), latent_channels=2, steps=2, batch_size=8),
)


@pytest.fixture
def in_files(tmp_path, monkeypatch):
    """Treat every split as too large for memory."""
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr(images, "IN_MEMORY_BYTES", 0)


def made(root: Path) -> dict[str, str]:
    """Return name -> hash of what codec and judge write."""
    accepted = root / "data" / "accepted.json"
    codec(root / "data" / "images", accepted, root / "codec", CODEC, judge_inputs.IMAGE)
    return contents(root / "codec") | contents(judge_inputs.run_judge(root, BRIEF))


def test_codec_and_judge_write_the_same_bytes(tmp_path, monkeypatch, request):
    judge_inputs.write_images(tmp_path)
    expected = made(tmp_path)
    request.getfixturevalue("in_files")
    assert made(tmp_path) == expected
    assert list((tmp_path / "scratch").iterdir()) == []


def anonymous_bytes() -> int:
    """Return the bytes of this process's memory that do not map files."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_the_memory_holds_no_copy(tmp_path, in_files):
    from tasks.download import download

    source = write_tree(tmp_path / "in", {f"{seed}.jpg": picture(seed, (8, 8), "JPEG") for seed in range(24)})
    download(tmp_path / "raw", folder_params(source))
    ingest(tmp_path / "raw", tmp_path / "images", tmp_path / "quarantine", ingest_params())
    large = ImageParams(resolution=1024, channels=3)
    images.load_pixels(tmp_path / "images", "test", large)  # loads the imports
    before = anonymous_bytes()
    samples = images.load_pixels(tmp_path / "images", "train", large)
    assert samples.pixels.nbytes > 40e6
    # A copy would be all of them; other threads of the process allocate some.
    assert anonymous_bytes() - before < samples.pixels.nbytes / 2
    assert samples.pixels[-1].std() > 1  # an image, not an empty file


def test_a_full_disk_is_an_error_before_anything_is_read(tmp_path, in_files):
    judge_inputs.write_images(tmp_path)
    large, limit = ImageParams(resolution=256, channels=3), 1_000_000  # more than the metadata take
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(StageError, match=r"has no space for them \(.*\); free some, set AFTERIMAGE_SCRATCH"):
            images.load_pixels(tmp_path / "data" / "images", "train", large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
