"""Aspect-ratio buckets: the bucket of an image, what is stored of it, and the order in which training draws."""

import collections
import io
import json

import numpy as np
import PIL.Image
import pytest
import torch

from tasks.codec import codec
from tasks.download import download
from tasks.encode import encode
from tasks.encoding.splits import size_conditioning
from tasks.formats import buckets, latents
from tasks.ingest import ingest
from tasks.params import AutoencoderParams, CodecParams, EncodeParams, ImageParams
from tasks.pictures import decoding, images
from tasks.runtime import atomic
from tasks.training.batches import Batches, Conditioning, DrawConfig
from tasks.training.bucketed import Bucketed
from tasks.training.stores import Resident
from tests.support.data_inputs import contents, folder_params, ingest_params, picture, write_tree
from tests.support.train_inputs import checkpoints, copy_of, results, train_here, uniform, write_inputs, write_params

SHAPES = {"square": (20, 20), "wide": (40, 20), "tall": (18, 36)}
"""Width and height of the images below."""
FILES = {f"{name}/{seed:02d}.png": picture(seed, size) for name, size in SHAPES.items() for seed in range(12)}
PARAMS = EncodeParams(buckets=(0.5, 2.0), bucket_multiple=8, shard_size=5)
IMAGE = ImageParams(resolution=32, channels=3)
RESOLUTIONS = [(32, 32), (40, 24), (24, 40)]


@pytest.mark.parametrize(("size", "multiple"), [(512, 64), (64, 16), (32, 8), (1024, 64)])
def test_buckets_have_the_area_of_the_square_and_sides_that_can_be_halved(size, multiple):
    ratios = (0.5, 2 / 3, 0.75, 1.0, 4 / 3, 1.5, 2.0)
    found = buckets.bucket_resolutions(size, ratios, multiple)
    assert found[0] == (size, size) and len(set(found)) == len(found)
    assert all(side % multiple == 0 for resolution in found for side in resolution)
    # a side is off by at most half of `multiple`, a larger share of a small side
    assert all(abs(height * width / size**2 - 1) <= multiple / size for height, width in found)
    assert set(found) == {(width, height) for height, width in found}  # these ratios come in pairs


def test_an_image_goes_to_the_bucket_with_the_nearest_aspect_ratio():
    sizes = ((10, 10), (500, 100), (100, 500), (100, 120))
    assert [buckets.nearest_bucket(*size, RESOLUTIONS) for size in sizes] == [0, 1, 2, 0]
    assert buckets.nearest_bucket(100, 128, RESOLUTIONS) == 0  # the limit is about sqrt(40 / 24)
    assert buckets.nearest_bucket(100, 131, RESOLUTIONS) == 2
    assert buckets.nearest_bucket(1, 7, [(32, 32)]) == 0


def test_an_upright_image_is_cropped_at_its_centre():
    stripes = np.zeros((20, 60, 3), np.uint8)
    stripes[:, 20:40] = 255
    whole = PIL.Image.fromarray(stripes)
    assert (decoding.crop_and_resize(whole, (20, 20), 1) == 255).all()
    assert (decoding.crop_and_resize(whole, (20, 60), 3) == stripes.transpose(2, 0, 1)).all()
    assert decoding.crop_and_resize(whole, (24, 40), 3).shape == (3, 24, 40)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    whole.save(file, "PNG", exif=exif)
    turned = decoding.open_image(file.getvalue(), max_pixels=10_000)
    assert turned.size == (60, 20) and decoding.upright_size(turned) == (60, 20)
    assert (decoding.crop_and_resize(turned, (60, 20), 1)[0, 20:40] == 255).all()


def test_size_and_crop_conditioning_of_sdxl():
    assert size_conditioning(480, 640, (480, 480)) == (480, 640, 0, 80, 480, 480)
    assert size_conditioning(100, 200, (24, 40)) == (100, 200, 0, 4, 24, 40)  # resized to 24 x 48; 4 columns cut off
    assert size_conditioning(200, 100, (40, 24)) == (200, 100, 4, 0, 40, 24)


@pytest.fixture
def encoded(tmp_path, monkeypatch):
    """Encode images of three shapes; returns the folder of the latents."""
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))

    def call(kind="autoencoder", params=PARAMS, files=FILES):
        download(tmp_path / "raw", folder_params(write_tree(tmp_path / "in", files)))
        ingest(tmp_path / "raw", tmp_path / "images", tmp_path / "quarantine", ingest_params())
        accepted = tmp_path / "accepted.json"
        atomic.write_json(accepted, {"verdict": "accepted"})
        small = AutoencoderParams(widths=(8, 16), latent_channels=2, steps=2, batch_size=8)
        wanted = CodecParams(kind=kind, conditioning="label", autoencoder=small)
        if not (tmp_path / "codec").exists():  # an edited image would train another autoencoder
            codec(tmp_path / "images", accepted, tmp_path / "codec", wanted, IMAGE)
        encode(tmp_path / "images", accepted, tmp_path / "codec", tmp_path / "latents", params)
        return tmp_path / "latents"

    return call


def test_pixels_are_stored_by_bucket(encoded, tmp_path):
    path = encoded("identity")
    index = latents.read_index(path)
    assert index.buckets == RESOLUTIONS and index.size == 32
    table = images.read_columns(tmp_path / "images", ["key", "split", "image", "label"]).to_pylist()
    for split in ("train", "test"):
        assert latents.buckets_of(path, split) == [0, 1, 2]
        stored = [latents.load_latents(path, split, bucket) for bucket in range(3)]
        assert sum(its.count for its in stored) == index.splits[split].count
        for name, its, resolution in zip(("square", "tall", "wide"), stored, RESOLUTIONS, strict=True):
            rows = sorted(
                (row for row in table if row["split"] == split and name in row["key"]), key=lambda r: r["key"]
            )
            for row, pixels, label in zip(rows, its.pixels, its.labels, strict=True):
                opened = decoding.open_image(row["image"], max_pixels=10_000)
                assert np.array_equal(pixels, decoding.crop_and_resize(opened, resolution, 3)) and label == row["label"]


def test_latents_are_stored_by_bucket_and_found_again(encoded, capsys):
    path = encoded()
    assert latents.read_index(path).buckets == [(16, 16), (20, 12), (12, 20)]
    for bucket, (height, width) in enumerate(RESOLUTIONS):
        its = latents.load_latents(path, "train", bucket)
        assert its.mean.shape[1:] == (1, 2, height // 2, width // 2) and its.mean.float().std() > 0
    before = contents(path)
    said = capsys.readouterr().out
    assert "images by bucket: 32x32 12, 24x40 12, 40x24 12" in said
    assert "36 images to encode, 0 known" in said
    assert contents(encoded()) == before
    assert "0 images to encode, 36 known" in capsys.readouterr().out
    encoded(files=FILES | {"wide/03.png": picture(99, (40, 20))})
    assert "1 images to encode, 35 known" in capsys.readouterr().out
    encoded(params=PARAMS.model_copy(update={"buckets": ()}))
    assert "changed since the last time: buckets; all images are encoded anew" in capsys.readouterr().out


def test_neither_workers_nor_stored_latents_change_a_byte(encoded, monkeypatch, tmp_path):
    before = contents(encoded(params=PARAMS.model_copy(update={"workers": 1})))
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "other"))
    encoded(files=FILES | {"tall/03.png": picture(99, (18, 36))})
    assert contents(encoded(params=PARAMS.model_copy(update={"workers": 3}))) == before


COUNTS = (37, 5, 16)


def bucketed(counts=COUNTS, **options) -> Bucketed:
    """Return buckets of images whose pixels equal their index."""
    device = torch.device("cpu")
    config = {"batch_size": 8, "timesteps": uniform(10)} | options
    several = []
    for number, count in enumerate(counts):
        pixels = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 1, 2, 2 + number))
        store = Resident([{"pixels": pixels}], device)
        several.append(Batches(store, Conditioning(), DrawConfig(seed=number, **config), device))
    return Bucketed(several, (1, 2, 2), seed=3)


def drawn(whole: Bucketed, step: int, part: int = 0) -> tuple[int, list[int]]:
    """Return the bucket of a step, known by the width of its batch, and its images."""
    x0 = whole.draw(step, part).x0
    return x0.shape[3] - 2, ((x0[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def test_every_image_is_drawn_once_per_epoch_and_buckets_in_proportion_to_their_size():
    whole = bucketed()
    seen = collections.defaultdict(list)
    epochs = 8
    steps = sum(count * epochs // 8 for count in COUNTS)
    for step in range(steps):
        bucket, rows = drawn(whole, step)
        assert len(rows) == 8
        seen[bucket] += rows
    for bucket, count in enumerate(COUNTS):
        assert len(seen[bucket]) == count * epochs // 8 * 8  # `epochs` times, except an incomplete last batch
        for start in range(0, len(seen[bucket]) - count + 1, count):
            assert sorted(seen[bucket][start : start + count]) == list(range(count))
    assert seen[0][:37] != seen[0][37:74]
    mixed = [drawn(whole, step)[0] for step in range(20)]
    assert len(set(mixed)) == 3 and mixed != sorted(mixed)


def test_a_batch_follows_from_its_step_alone():
    forwards, backwards = bucketed(), bucketed()
    steps = [0, 3, 17, 18, 19, 1000, 123_456]
    batches = {step: forwards.draw(step) for step in steps}
    for step in reversed(steps):
        again = backwards.draw(step)
        assert all(torch.equal(getattr(again, name), getattr(batches[step], name)) for name in ("x0", "eps", "t"))


def test_parts_and_processes_share_the_bucket_and_the_images_of_a_step():
    whole = bucketed()
    shared = [bucketed(batch_size=4, parts=2, process=process, processes=2) for process in range(2)]
    for step in range(12):
        several = [drawn(each, step, part) for part in range(2) for each in shared]
        bucket, images = drawn(whole, step)
        assert {found for found, _ in several} == {bucket}
        assert [row for _, rows in several for row in rows] == images


def test_a_bucket_smaller_than_a_batch_is_drawn_when_it_fills_one():
    whole = bucketed((30, 1))
    steps = [drawn(whole, step) for step in range(31 * 4)]
    assert sum(bucket == 1 for bucket, _ in steps) == 4
    assert {row for bucket, rows in steps if bucket == 1 for row in rows} == {0}


@pytest.mark.usefixtures("small_sample_grids")
@pytest.mark.parametrize("architecture", ["unet", "dit"])
@pytest.mark.parametrize("conditioning", ["label", "text"])
def test_a_training_on_buckets_that_is_interrupted_ends_in_the_same_bytes(
    conditioning, architecture, tmp_path, monkeypatch, migrated_database
):
    """Each network, with two buckets that are not square."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    write_inputs(whole, conditioning, count=20, buckets=((8, 8), (4, 12), (12, 4)))
    brief = {"steps": 12, "warmup_steps": 2, "batch_size": 8, "checkpoint_every": 4, "sample_every": 6}
    write_params(whole, conditioning, architecture=architecture, **brief)
    train_here(whole, monkeypatch, migrated_database)
    copy_of(whole, stopped)

    from tasks.training import checkpoint

    save = checkpoint.save

    def save_and_stop(*arguments):
        save(*arguments)
        if checkpoints(stopped / "scratch")[-1].name.endswith("4"):
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train_here(stopped, monkeypatch, migrated_database)
    monkeypatch.setattr(checkpoint, "save", save)
    train_here(stopped, monkeypatch, migrated_database)
    assert results(stopped) == results(whole)
    assert json.loads((whole / "pipeline" / "afterimage.json").read_text())["size"] == 8
