"""Unusual image files: colour profiles, long text chunks, unknown suffixes, unsupported formats."""

import io
import os
import random
import struct
import tarfile
import zipfile

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.PngImagePlugin
import pyarrow.parquet as pq
import pytest

from tasks.download import download
from tasks.ingest import ingest
from tasks.pictures import colours, decoding, images
from tasks.pictures.index import read_index
from tasks.runtime.errors import StageError
from tasks.sources import archive_members, archives
from tests.support.bad_inputs import saved
from tests.support.data_inputs import folder_params, ingest_params, picture, write_tree, write_zip


def wide_profile():
    """An ICC profile, version 2, of Adobe RGB (1998): its primaries and a gamma of 2.2."""

    def fixed(*values):
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    gamma = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.19921875 * 256)) + b"\0\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + bytes(79),
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249),
        b"rXYZ": b"XYZ \0\0\0\0" + fixed(0.60974, 0.31111, 0.01947),
        b"gXYZ": b"XYZ \0\0\0\0" + fixed(0.20528, 0.62567, 0.06087),
        b"bXYZ": b"XYZ \0\0\0\0" + fixed(0.14919, 0.06322, 0.74457),
        b"rTRC": gamma,
        b"gTRC": gamma,
        b"bTRC": gamma,
    }
    place, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", place + len(body), len(data))
        body += data
    header = struct.pack(">I4sI4s4s4s", place + len(body), b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1.0, 0.8249) + bytes(48)
    return header + table + body


SRGB = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
PROFILES = {"none": None, "sRGB": SRGB, "converted": wide_profile(), "not usable": wide_profile()[:200]}


@pytest.fixture
def taken(tmp_path):
    """Download and ingest a local source; returns the index, keys of rows, reasons by key."""

    def call(path):
        raw, out, quarantine = tmp_path / "raw", tmp_path / "images", tmp_path / "quarantine"
        download(raw, folder_params(path))
        ingest(raw, out, quarantine, ingest_params())
        index = read_index(out)
        keys = set(images.read_columns(out, ["key"]).column(0).to_pylist())
        refused = pq.read_table(quarantine / "quarantine.parquet").to_pylist()
        return index, keys, {row["key"]: row["reason"] for row in refused}

    return call


def tagged(profile, colour=(200, 30, 30), mode="RGB", kind="PNG", **options):
    image = PIL.Image.new("RGBA", (16, 12), (*colour, 128)).convert(mode)
    return saved(image, kind, **({"icc_profile": PROFILES[profile]} if PROFILES[profile] else {}), **options)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("name", PROFILES)
def test_a_colour_profile_is_converted_to_srgb(kind, name):
    image = decoding.open_image(tagged(name, kind=kind, **({"quality": 100} if kind != "PNG" else {})), 10_000)
    assert colours.profile(image) == name
    seen = decoding.crop_and_resize(image, (8, 8), 3)[:, 4, 4].astype(int)
    stored = np.asarray(image.convert("RGB"))[4, 4].astype(int)
    # (200, 30, 30) of Adobe RGB is a red that sRGB does not reach: 235 and no green; by colorimetry, and lcms agrees.
    expected = [235, 24, 26] if name == "converted" else stored
    assert np.abs(seen - expected).max() <= (8 if name == "converted" else 0)


def test_transparency_and_orientation_survive_the_conversion():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    image = decoding.open_image(tagged("converted", mode="RGBA", exif=exif), 10_000)
    assert decoding.upright_size(image) == (16, 12)
    whole = decoding.to_mode(image, 3)
    assert whole.size == (12, 16)
    assert np.asarray(whole)[3, 3].min() > 120, "half of white shines through"


def test_a_profile_for_another_colour_space_is_not_used():
    image = decoding.open_image(tagged("converted", mode="L"), 10_000)
    assert colours.profile(image) == "not usable"
    assert np.array_equal(decoding.to_mode(image, 1), image)


def test_converted_images_are_counted(tmp_path, taken, capsys):
    files = {f"{name}.png": tagged(name, (200, place, 30)) for place, name in enumerate(PROFILES)}
    index, keys, _ = taken(write_tree(tmp_path / "in", files))
    assert (len(keys), index.profiles) == (4, {"converted": 1, "not usable": 1})
    output = capsys.readouterr().out
    assert "1 images have a colour profile other than sRGB and are converted to sRGB (first converted.png)" in output
    assert "(first not usable.png)" in output


@pytest.mark.parametrize("size", [2 << 20, 80 << 20])
@pytest.mark.parametrize("packed", [False, True])
def test_an_image_with_a_long_text_chunk_is_read(size, packed):
    texts = PIL.PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * size, zip=packed)
    image = decoding.open_image(saved(PIL.Image.open(io.BytesIO(picture(1))), "PNG", pnginfo=texts), 10_000)
    assert np.array_equal(image, PIL.Image.open(io.BytesIO(picture(1))))


TARGA = saved(PIL.Image.new("RGB", (9, 9), "red"), "TGA")
ODD = {
    "a.mpo": (picture(1, kind="JPEG"), None),
    "b.apng": (picture(2), None),
    "c.pnm": (picture(3, kind="PPM"), None),
    "d.jpg_large": (picture(4, kind="JPEG"), None),
    "e": (picture(5, kind="JPEG"), None),
    "IMG_0001.JPG~2": (picture(6, kind="WEBP"), None),
    "f.tga": (TARGA, "Targa is not read"),
    "g": (b"\0\0\0\x18ftypheic" + bytes(60), "HEIF is not read"),
    "h.avif": (b"\0\0\0\x18ftypavif" + bytes(60), "AVIF is not read"),
    "notes": (b"only text", "no image file"),
    "i.txt": (b"\xff\xd8\xff", "no image file"),
}


@pytest.mark.parametrize("form", ["folder", "zip", "tar.gz", "shard"])
def test_images_are_recognised_by_their_content(tmp_path, taken, form):
    path = write_tree(tmp_path / "in", {name: data for name, (data, _) in ODD.items()})
    if form == "zip":
        path = write_zip(tmp_path / "in.zip", {name: data for name, (data, _) in ODD.items()})
    elif form != "folder":
        with tarfile.open(tmp_path / "in.tar", "w:gz" if form == "tar.gz" else "w") as archive:
            archive.add(path, ".")
        path = tmp_path / "in.tar"
        if form == "shard":
            path = write_tree(tmp_path / "outer", {"s.tar": path.read_bytes()})
    _, keys, refused = taken(path)
    inside = "s.tar/" if form == "shard" else ""
    assert keys == {f"{inside}{name}" for name, (_, reason) in ODD.items() if reason is None}
    assert refused == {f"{inside}{name}": reason for name, (_, reason) in ODD.items() if reason}


def test_file_names_with_a_colon_are_accepted(tmp_path, taken):
    names = {"12:30:00.jpg", "a:b/1.png", "x:y.png"}
    _, keys, refused = taken(write_zip(tmp_path / "in.zip", {name: picture(len(name)) for name in names}))
    assert (keys, refused) == (names, {})


@pytest.mark.parametrize("inside", [False, True])
def test_a_hard_link_has_the_content_of_its_file(tmp_path, taken, inside):
    folder = write_tree(tmp_path / "in", {"a/x.png": picture(1), "b/y.png": picture(2)})
    os.link(folder / "a/x.png", folder / "z.png")
    os.link(folder / "a/x.png", folder / "b/w.png")
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        archive.add(folder, ".")
    path = tmp_path / "in.tar"
    if inside:
        path = write_tree(tmp_path / "outer", {"s.tar": path.read_bytes()})
    _, keys, refused = taken(path)
    assert {key.removeprefix("s.tar/") for key in keys} == {"a/x.png", "b/y.png", "b/w.png", "z.png"}
    assert refused == {}
    table = images.read_columns(tmp_path / "images", ["key", "image"]).to_pydict()
    by_name = {key.removeprefix("s.tar/"): data for key, data in zip(table["key"], table["image"], strict=True)}
    assert by_name["z.png"] == by_name["b/w.png"] == by_name["a/x.png"] == picture(1)


@pytest.mark.parametrize("form", ["one file", "many files", "zip", "long header"])
def test_a_decompression_bomb_is_refused(tmp_path, form):
    """Some hundred kilobytes that become hundreds of megabytes, in seconds and little memory."""
    path, zeros = tmp_path / "in", bytes(1 << 20)
    if form == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for number in range(40):
                archive.writestr(f"{number}.png", zeros)
    else:
        with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT, compresslevel=9) as archive:
            if form == "one file":
                info = tarfile.TarInfo("a.png")
                info.size = 40 << 20
                archive.addfile(info, io.BytesIO(bytes(40 << 20)))
            elif form == "long header":
                info = tarfile.TarInfo("a.png")
                info.pax_headers = {"comment": "x" * (40 << 20)}
                archive.addfile(info)
            else:
                block = tarfile.TarInfo("a.png").tobuf()
                archive.fileobj.write(block * ((40 << 20) // len(block)))
    assert path.stat().st_size < 1_000_000
    with pytest.raises(StageError, match=r"set download\.path to the folder"):
        archives.list_members(path)


@pytest.mark.parametrize("form", ["zip", "tar.gz"])
def test_the_unpacked_bytes_of_an_archive_have_an_absolute_limit(tmp_path, monkeypatch, form):
    """Also of an archive that is packed as little as real images are."""
    monkeypatch.setattr(archive_members, "FREE_BYTES", 1 << 16)
    path, half = tmp_path / "in", bytes(1 << 16) + random.Random(0).randbytes(1 << 16)
    if form == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.png", half)
    else:
        with tarfile.open(path, "w:gz") as archive:
            info = tarfile.TarInfo("a.png")
            info.size = len(half)
            archive.addfile(info, io.BytesIO(half))
    assert [member.name for member in archives.list_members(path)] == ["a.png"]
    monkeypatch.setattr(archive_members, "MAX_BYTES", (1 << 17) - 1)
    with pytest.raises(StageError, match=r"like a decompression bomb.*set download\.path to the folder"):
        archives.list_members(path)


def test_the_shards_open_in_hugging_face_datasets(tmp_path, taken):
    datasets = pytest.importorskip("datasets")
    files = {f"{name}/{seed}.png": picture(seed) for seed in range(3) for name in ("cat", "dog")}
    taken(write_tree(tmp_path / "in", files))
    shards = [str(path) for path in sorted((tmp_path / "images").glob("*.parquet"))]
    rows = datasets.load_dataset("parquet", data_files=shards, split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.features["label"].names == ["cat", "dog"]
    assert isinstance(rows[0]["image"], PIL.Image.Image) and rows[0]["image"].size == (12, 12)
