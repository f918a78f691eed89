"""Control maps of the user's own: a folder `conditioning`, or a column `conditioning_image`, through to the latents."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.codec import codec
from tasks.download import download
from tasks.encode import encode
from tasks.formats import latents
from tasks.formats.verdict import Verdict
from tasks.ingest import ingest
from tasks.params import CodecParams, ControlParams, EncodeParams, ImageParams
from tasks.pictures.images import map_hashes, read_index
from tasks.runtime.errors import StageError
from tasks.sources import folder, picture_tables
from tasks.sources.entry import TableColumns
from tests.support.data_inputs import folder_params, ingest_params, picture, write_tree

OWN = EncodeParams(control=ControlParams(kind="own"))
SIDE = 8


def through(root, files: dict[str, bytes]) -> None:
    source = write_tree(root / "in", files)
    download(root / "raw", folder_params(source))
    ingest(root / "raw", root / "images", root / "quarantine", ingest_params())
    Verdict().write(root / "accepted.json")
    params = CodecParams(kind="identity", conditioning="none")
    codec(root / "images", root / "accepted.json", root / "codec", params, ImageParams(resolution=SIDE, channels=3))
    encode(root / "images", root / "accepted.json", root / "codec", root / "latents", OWN)


def test_a_paired_folder_reaches_the_latents(tmp_path, monkeypatch):
    """Each map is the image turned upside down, so that the pairing shows."""
    import io

    import PIL.Image

    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))

    def turned(data: bytes) -> bytes:
        out = io.BytesIO()
        PIL.Image.open(io.BytesIO(data)).transpose(PIL.Image.Transpose.FLIP_TOP_BOTTOM).save(out, "PNG")
        return out.getvalue()

    pictures = {f"{seed:02d}": picture(seed, (SIDE, SIDE)) for seed in range(20)}
    files = {f"images/{name}.png": data for name, data in pictures.items()}
    through(tmp_path, files | {f"conditioning/{name}.png": turned(data) for name, data in pictures.items()})
    assert read_index(tmp_path / "images").rows == 20 and len(map_hashes(tmp_path / "images")) == 20
    for split in ("train", "test"):
        for shard in latents.open_shards(tmp_path / "latents", split):
            assert np.array_equal(shard["control"], shard["pixels"][:, :, ::-1])


def test_an_image_without_a_map_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    files = {f"{seed:02d}.png": picture(seed) for seed in range(12)}
    with pytest.raises(StageError, match=r"1 of 12 images have no control map \(11\.png\).*a folder 'conditioning'"):
        through(tmp_path, files | {f"conditioning/{seed:02d}.png": picture(seed + 50) for seed in range(11)})


def test_folders_of_maps_are_found_by_the_names_of_their_images():
    assert folder.control_maps(["a/1.jpg", "a/conditioning/1.png", "a/conditioning/2.png"]) == {
        "a/conditioning/1.png": "a/1.jpg"
    }
    assert folder.control_maps(["train/images/x.jpg", "train/conditioning/x.png"]) == {
        "train/conditioning/x.png": "train/images/x.jpg"
    }
    assert folder.control_maps(["conditioning/1.png", "heating/2.png"]) == {}  # classes of an image data set


def test_a_column_of_a_table(tmp_path):
    def column(first: int) -> list[dict[str, bytes]]:
        return [{"bytes": picture(seed)} for seed in range(first, first + 3)]

    table = {"image": column(0), "conditioning_image": column(10), "text": ["a", "b", "c"]}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    source = picture_tables.read({"train.parquet": tmp_path / "train.parquet"}, TableColumns(), 10**6)
    entries = list(source.entries)
    images = [entry for entry in entries if entry.map_of is None]
    maps = {entry.map_of: entry.data for entry in entries if entry.map_of is not None}
    assert [image.data for image in images] == [picture(seed) for seed in range(3)]
    assert [maps[image.key] for image in images] == [picture(seed) for seed in range(10, 13)]
