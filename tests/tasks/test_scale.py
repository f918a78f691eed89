"""What a data set of many rows needs: bounded memory, many shards, and the same bytes as a small one."""

from __future__ import annotations

import hashlib
import json
import resource
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.encoding.rows import Missing, buckets_in, digests_in, distinct_captions, read_rows
from tasks.pictures import content, images, spooled
from tasks.pictures.content import ContentHash
from tasks.pictures.digests import Digests, digests
from tasks.pictures.images import Writer
from tasks.pictures.index import FILE
from tasks.runtime.errors import StageError


def row(number: int, data: bytes = b"x", **others: object) -> images.ImageRow:
    """A row of 2,000: ten files repeat another, and each pair has perceptual hashes that differ in one bit."""
    sha256, pair = (hashlib.sha256(str(name).encode()).hexdigest() for name in (number % 1990, number // 2))
    return {
        "key": f"{number:06d}.png", "image": data, "width": 8 + number % 3 * 8, "height": 8, "mode": "L",
        "label": None, "captions": [f"picture {number % 50}"] * (number % 3), "sha256": sha256,
        "split": "test" if number % 5 == 0 else "train", "phash": pair[:15] + "01"[number % 2], "safety": None,
        "licence": "x", "source": "x", **others,
    }  # fmt: skip


def test_the_content_hash_is_that_of_one_run(tmp_path, monkeypatch):
    numbers = [number * 37 % 1000 for number in range(1000)]
    found = []
    for rows in (1 << 18, 70, 1000):
        monkeypatch.setattr(content, "RUN_ROWS", rows)
        collected = ContentHash(tmp_path)
        for number in numbers:
            collected.add(f"ключ {number}", [number])
        found.append(collected.hexdigest())
    assert len(set(found)) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_content_hash_of_control_maps_is_that_of_their_json(tmp_path):
    maps = images.MapWriter(tmp_path)
    data = {f'ключ {number * 7 % 30} "': f"{number}".encode() for number in range(30)}
    for key, each in data.items():
        maps.add(key, each)
    pairs = sorted((key, hashlib.sha256(each).hexdigest()) for key, each in data.items())
    index = maps.close(images.ImageIndex([], {}, 0, {}, 0, "ab"))
    assert index.sha256 == hashlib.sha256(json.dumps(["ab", pairs]).encode()).hexdigest()


def test_the_memory_of_the_content_hash_does_not_grow(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "RUN_ROWS", 2000)
    collected = ContentHash(tmp_path)
    tracemalloc.start()
    for number in range(20_000):
        collected.add(f"{number}", [number])
        if number == 4000:
            tracemalloc.reset_peak()
            early = tracemalloc.get_traced_memory()[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    collected.hexdigest()
    assert peak < early + 2000 * 400  # a run, and the list of its keys while it is sorted


def test_four_thousand_shards_hold_what_one_holds(tmp_path):
    written = {}
    for shards in (1, 4096):
        (tmp_path / str(shards)).mkdir()
        writer = Writer(tmp_path / str(shards), shards)
        for number in range(300):
            writer.add(row(number))
        index = writer.close()
        tables = [pq.read_table(tmp_path / str(shards) / name).to_pylist() for name in index.shards]
        written[shards] = index.sha256, sorted((found for table in tables for found in table), key=lambda r: r["key"])
        assert index.rows == 300
    assert written[1] == written[4096]
    assert len(index.shards) > 250 and all(len(name) == len("shard-000.parquet") for name in index.shards)


def test_too_few_open_files_are_one_sentence(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    with pytest.raises(
        StageError, match=r"4096 shards need 4224 open files, and 1024 are allowed; lower ingest\.shards"
    ):
        images.allow_open_files(4096)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    writer = Writer(tmp_path / "images", 16)
    for number in range(2000):
        writer.add(row(number))
    writer.close().write(tmp_path / "images" / FILE)
    return tmp_path / "images"


def test_rows_are_sorted_by_bucket_and_key_and_read_in_parts(folder, monkeypatch):
    resolutions = [(8, 8), (8, 16)]
    splits = read_rows(folder, resolutions)
    assert list(splits) == ["test", "train"] and [len(rows) for rows in splits.values()] == [400, 1600]
    for rows in splits.values():
        listed = list(rows)
        assert listed == sorted(listed, key=lambda one: (one.bucket, one.key))
        assert [one.bucket for one in listed] == [int(one.width > 11) for one in listed]
        assert rows[390:410] == listed[390:410] and list(rows.strings("key")) == [one.key for one in listed]
        assert list(rows.in_bucket(1)) == [one for one in listed if one.bucket == 1]
        assert all(one.label == -1 and len(one.captions) == int(one.key[:6]) % 3 for one in listed)
    assert list(distinct_captions(splits).strings("caption")) == sorted(f"picture {number}" for number in range(50))


def test_the_content_hash_covers_the_identities_in_the_order_of_their_keys(folder):
    content = hashlib.sha256()
    for number in range(2000):  # whose keys are in this order
        one = row(number)
        identity = [one["key"], one["sha256"], one["split"], one["label"], one["captions"]]
        content.update(hashlib.sha256(json.dumps(identity).encode("utf-8")).digest())
    assert images.read_index(folder).sha256 == content.hexdigest()


def findings_of(folder: Path, parts: int, monkeypatch, **params: object) -> list:
    from tasks.formats import quarantine as quarantines
    from tasks.params import Demands, ValidateParams
    from tasks.sources.entry import Entry, Problem
    from tasks.validation import duplicates, expectations, tables

    refused = folder.parent / f"quarantine-{parts}"
    refused.mkdir()
    writer = quarantines.Writer(refused)
    writer.add(Entry("bad.png", b"x", 1), Problem("truncated", "it ends early"))
    writer.close()
    limits = {
        "min_images": 1,
        "max_aspect_ratio": 1.5,
        "min_images_per_class": 0,
        "min_side": 8,
        "max_quarantined_fraction": 0.1,
        **params,
    }
    asked = {
        "codec.conditioning": "text", "evaluate.allow_small_n": True, "image.resolution": 9,
        "judge.extractor.kind": "in_domain", "train.batch_size": 4,
    }  # fmt: skip
    index = images.read_index(folder)
    monkeypatch.setattr(tables, "PART_ROWS", -(-index.rows // parts))
    monkeypatch.setattr(duplicates, "PART_HASHES", 1 << 18 if parts == 1 else 100)
    monkeypatch.setattr(duplicates, "SAMPLED", 64 if parts == 1 else 4)
    monkeypatch.setattr(expectations, "write_docs", lambda *_: None)
    built = tables.build(
        folder, refused, index, {}, ValidateParams.model_validate(limits), Demands.model_validate(asked)
    )
    return expectations.judge(built, folder.parent / "docs")


def test_gates_over_parts_are_those_over_all_rows(folder, monkeypatch):
    """Duplicates lie in other parts, and shares are those of all rows."""
    (whole, parted) = (findings_of(folder, parts, monkeypatch) for parts in (1, 5))
    assert [finding.gate for finding in whole] == [finding.gate for finding in parted]
    for one, other in zip(whole, parted, strict=True):
        assert one.success == other.success, one.gate
        if one.gate.check in ("near_duplicates", "near_leaks"):
            assert abs(one.unexpected - other.unexpected) <= 3
        else:
            assert (one.unexpected, one.observed) == (other.unexpected, other.observed), one.gate
        assert len(one.offenders) <= len(other.offenders)
    found = {finding.gate.check: finding for finding in parted}
    assert found["duplicates"].unexpected + found["leaks"].unexpected >= 10 and found["duplicates"].success
    # Three of five pairs are in one split, and the second of a pair counts: 600, less those that repeat a file.
    assert 594 <= found["near_duplicates"].unexpected <= 597 and not found["near_duplicates"].success
    assert found["near_leaks"].unexpected == 400  # the other pairs
    assert not found["aspect"].success and found["rows"].success and found["splits"].success


def test_parts_are_consecutive_and_divide_no_key(folder, monkeypatch):
    from tasks.validation import tables

    monkeypatch.setattr(tables, "PART_ROWS", 300)
    monkeypatch.setattr(spooled, "BATCH_ROWS", 70)
    keys = sorted([*(row(number)["key"] for number in range(2000)), *(row(599)["key"] for _ in range(40))])

    def source(columns):
        yield pa.table([pa.array(keys[::-1])], names=columns)

    parts = tables._parts(spooled.sort(source, ["key"], ["key"]))
    assert [list(part.strings("key")) for part in parts] == [
        keys[:300], keys[300:640], *(keys[start : start + 300] for start in range(640, 2040, 300)),
    ]  # fmt: skip


@pytest.mark.parametrize("part_rows", [64, 500, 1 << 16])
def test_rows_are_sorted_in_a_file(monkeypatch, tmp_path, part_rows):
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path))
    monkeypatch.setattr(spooled, "PART_ROWS", part_rows)
    monkeypatch.setattr(spooled, "SAMPLED", 16)
    monkeypatch.setattr(spooled, "BATCH_ROWS", 50)
    random = np.random.default_rng(0)
    groups = random.integers(0, 3, 3000).tolist()
    keys = [f"{'пр' * (number % 2)}{number:04d}" for number in random.permutation(3000).tolist()]
    texts = [[f"{number % 7}"] * (number % 3) for number in range(3000)]

    def source(columns):
        for start in range(0, 3000, 37):
            part = slice(start, start + 37)
            table = pa.table({"group": groups[part], "key": keys[part], "texts": texts[part]})
            yield table.select(columns)

    table = spooled.sort(source, ["group", "key", "texts"], ["group", "key"])
    expected = sorted(zip(groups, keys, texts, strict=True))
    assert [tuple(found.values()) for found in table.read().to_pylist()] == expected
    assert list(table.slice(120, 333).select(["key"]).strings("key")) == [key for _, key, _ in expected[120:333]]
    column = spooled.Column(table.slice(7, 2000), "texts")
    assert (len(column), list(column)) == (1993, [found for _, _, found in expected[7:2000]])
    assert (column[400], column[-1], column[5:9]) == (expected[407][2], expected[1999][2], list(column)[5:9])
    assert list(spooled.sort(source, ["group"], ["group"], distinct=True).strings("group")) == [0, 1, 2]
    assert list(tmp_path.iterdir()) == []


def test_strings_are_found_by_their_digests():
    strings = [f"key {number % 700}" for number in range(1000)]
    held = Digests(digests(strings))
    numbers = held.numbers(strings)
    assert len(held) == 700 and sorted(set(numbers.tolist())) == list(range(700))
    assert np.array_equal(numbers[:300], numbers[700:])
    assert held.numbers(["another", strings[5], ""]).tolist() == [-1, numbers[5], -1]
    assert Digests(digests([])).numbers(["a"]).tolist() == [-1]
    assert held.values.itemsize == 16


def test_every_content_is_read_once(folder):
    wanted = [row(number)["sha256"] for number in (3, 5, 1995)]  # the last two are equal
    read = [sha256 for sha256, _, _ in images.read_encoded(folder, wanted)]
    assert sorted(read) == sorted({row(number)["sha256"] for number in (3, 5)} | {row(1995)["sha256"]})
    every = [sha256 for sha256, _, _ in images.read_encoded(folder, [row(number)["sha256"] for number in range(2000)])]
    assert len(every) == len(set(every)) == 1990
    assert list(images.read_encoded(folder, ["0" * 64])) == []


def test_what_is_missing_has_the_resolution_of_its_bucket(folder):
    resolutions = [(8, 8), (8, 16)]
    splits = read_rows(folder, resolutions)
    listed = [one for rows in splits.values() for one in rows]
    names, first = np.unique(digests_in(splits, "key"), return_index=True)
    missing = Missing(names[::2], buckets_in(splits)[first[::2]], resolutions)
    held = set(names[::2].tolist())
    found = {one.key: missing.resolution(one.key) for one in listed if digests([one.key])[0] in held}
    assert len(missing) == len(found) == 1000
    assert all(found[one.key] == resolutions[one.bucket] for one in listed if one.key in found)
    assert Missing(digests(["b", "a"]), np.arange(2), [(1, 2), (3, 4)]).resolution("a") == (3, 4)


def blocks_of(folder: Path, count: int, rows: int = 50):
    """Return blocks of `count` keys, whose rows hold their number."""
    import torch

    from tasks.encoding.blocks import Blocks

    blocks = Blocks(folder, {"recipe": 1})
    blocks.open()
    for start in range(0, count, rows):
        keys = [f"key {number}" for number in range(start, start + rows)]
        blocks.add(keys, {"number": torch.arange(start, start + rows)[:, None]})
    return blocks


def test_rows_of_blocks_are_found_again(tmp_path):
    import torch

    from tasks.encoding.blocks import Blocks

    blocks, numbers = blocks_of(tmp_path, 500), [499, 0, 250, 0, 7]
    for one in (blocks, Blocks(tmp_path, {"recipe": 1})):
        assert one.take([f"key {number}" for number in numbers])["number"].flatten().tolist() == numbers
        assert one.missing(["new", "key 3", "key 500", "new"]) == ["new", "key 500"]
        assert one.known(digests(["key 3", "new"])).tolist() == [True, False]
        with pytest.raises(KeyError, match="key 500"):
            one.take(["key 3", "key 500"])
    blocks.add(["key 3", "key 600"], {"number": torch.tensor([[1003], [600]])})
    assert blocks.take(["key 3"])["number"].item() == 1003, "the row that was entered last counts"
    blocks.forget(digests(["key 0", "key 600", "new"]))
    assert len(list(blocks.folder.glob("*.safetensors"))) == 2
    for one in (blocks, Blocks(tmp_path, {"recipe": 1})):
        assert one.missing(["key 0", "key 49", "key 50", "key 600"]) == ["key 50"]


def test_a_row_of_a_block_takes_few_bytes(tmp_path):
    """A dictionary of the keys took 300 bytes a row."""
    from tasks.encoding.blocks import Blocks

    blocks_of(tmp_path, 20_000, 5000)
    tracemalloc.start()
    blocks = Blocks(tmp_path, {"recipe": 1})
    blocks.known(digests(["key 1"]))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 20_000 * 50
