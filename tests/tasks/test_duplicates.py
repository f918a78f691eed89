"""Duplicate detection, compared with a search over all pairs."""

import numpy as np
import pytest

from tasks.validation import duplicates


def crowded(count, seed=0):
    """Hashes of which many differ in a few bits: copies of a few hashes with some bits flipped."""
    random = np.random.default_rng(seed)
    hashes = random.choice(random.integers(0, 2**63, count // 4, dtype=np.uint64), count)
    for _ in range(3):
        turned = random.integers(0, 2, count, dtype=np.uint64)
        hashes ^= turned << random.integers(0, 64, count, dtype=np.uint64)
    return hashes


def first(hashes, rows, among, bits):
    """For each of `rows` the first near one in `among`, -1 for none."""
    chosen, others = np.zeros(len(hashes), bool), np.zeros(len(hashes), bool)
    chosen[rows], others[among] = True, True
    found = dict(zip(*map(np.ndarray.tolist, duplicates.Neighbours(hashes, bits).first(chosen, others)), strict=True))
    return [found.get(row, -1) for row in rows.tolist()]


@pytest.fixture(params=[50, 1 << 16], ids=["in parts", "at once"])
def _parts(request, monkeypatch):
    monkeypatch.setattr(duplicates, "PART_HASHES", request.param)
    monkeypatch.setattr(duplicates, "SAMPLED", 10)


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("bits", [0, 1, 2, 3, 5])
def test_all_near_pairs_are_found_and_no_others(bits):
    hashes = np.unique(crowded(800))
    left, right = np.nonzero(np.triu(np.bitwise_count(hashes[:, None] ^ hashes[None]) <= bits, 1))
    found = duplicates.near_pairs(hashes, bits)
    assert set(zip(*map(np.ndarray.tolist, found), strict=True)) == set(zip(left.tolist(), right.tolist(), strict=True))
    assert bits == 0 or len(left) > 10


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("bits", [0, 2])
def test_the_first_near_duplicate_of_a_row_is_found(bits):
    hashes = crowded(500, seed=1)
    hashes[100:120] = hashes[:20]
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None])
    own = np.arange(500)
    expected = [min(np.flatnonzero(row <= bits)) for row in distances]
    expected = [-1 if first == row else first for row, first in enumerate(expected)]
    assert first(hashes, own, own, bits) == expected
    rows, among = own[300:], own[:300]
    expected = [min(np.flatnonzero(distances[row][:300] <= bits), default=-1) for row in rows]
    assert first(hashes, rows, among, bits) == expected


def test_many_equal_hashes_are_found_quickly():
    hashes = np.full(200_000, 0xF0F0, np.uint64)
    every = np.ones(200_000, bool)
    rows, others = duplicates.Neighbours(hashes, 3).first(every, every)
    assert len(rows) == 199_999 and rows[0] == 1 and (others == 0).all()


def test_hashes_are_read_as_numbers():
    assert duplicates.to_numbers(["00000000000000ff", "8000000000000000"]).tolist() == [255, 2**63]
