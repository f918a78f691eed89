"""The conversion between uint8 and [-1, 1], on NumPy and torch alike."""

import numpy as np
import pytest
import torch

from models.images.pixels import from_uint8, to_uint8

LEVELS = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)


def test_all_levels_survive_the_round_trip():
    assert from_uint8(LEVELS).dtype == np.float32
    assert np.array_equal(to_uint8(from_uint8(LEVELS)), LEVELS)
    assert (from_uint8(LEVELS).min(), from_uint8(LEVELS).max()) == (-1, 1)


@pytest.mark.parametrize(
    "values", [np.linspace(-1.2, 1.2, 1001, dtype=np.float32), np.float32([-1, 0, 1, 0.5 / 127.5])]
)
def test_torch_and_numpy_give_the_same_bytes(values):
    assert to_uint8(torch.from_numpy(values)).dtype == torch.uint8
    assert np.array_equal(to_uint8(torch.from_numpy(values)).numpy(), to_uint8(values))
    assert np.array_equal(from_uint8(torch.from_numpy(LEVELS)).numpy(), from_uint8(LEVELS))


def test_values_outside_the_range_are_clipped():
    assert to_uint8(np.float32([-3, -1.01, 1.01, 7])).tolist() == [0, 0, 255, 255]
