"""Grids, animations and PNG files: every pixel where it belongs, the same bytes again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.images import pictures


def colours(count: int, size: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def test_grid_enlarges_by_repetition_and_leaves_gaps_transparent() -> None:
    images = colours(5)
    grid = np.asarray(pictures.grid(images, columns=3, scale=2, padding=3))
    assert grid.shape == (8 + 3 + 8, 3 * 8 + 2 * 3, 4)
    for index, image in enumerate(images):
        top, left = 11 * (index // 3), 11 * (index % 3)
        tile = grid[top : top + 8, left : left + 8]
        assert np.array_equal(tile[::2, ::2, :3], image.transpose(1, 2, 0))
        assert np.array_equal(tile[1::2, 1::2], tile[::2, ::2])
        assert (tile[..., 3] == 255).all()
    assert not grid[8:11, :, 3].any()
    assert not grid[11:, 22:, 3].any(), "the sixth cell is empty"


def test_grey_images_become_equal_channels() -> None:
    grey = np.arange(16, dtype=np.uint8).reshape(1, 1, 4, 4)
    grid = np.asarray(pictures.grid(grey, columns=1, scale=1))
    assert np.array_equal(grid[..., :3], np.repeat(grey[0, 0, :, :, None], 3, axis=2))


def test_titles_stand_outside_the_images() -> None:
    images = colours(4, size=16)
    plain = np.asarray(pictures.grid(images, columns=2, scale=4))
    titled = np.asarray(pictures.grid(images, 2, 4, row_titles=["one", "two"], column_titles=["left", "x" * 80]))
    height, width = plain.shape[:2]
    assert np.array_equal(titled[-height:, -width:], plain)
    assert titled[-height:, :-width, 3].any(), "row titles are missing"
    assert titled[:-height, -width:, 3].any(), "column titles are missing"
    gap = titled[:-height, -width + 64 : -width + 66, 3]
    assert not gap.any(), "a long title runs into its neighbour's column"


@pytest.mark.parametrize(
    ("images", "options", "complaint"),
    [
        (np.zeros((2, 1, 4, 4), np.float32), {}, "uint8"),
        (np.zeros((2, 4, 4), np.uint8), {}, "uint8"),
        (np.zeros((2, 2, 4, 4), np.uint8), {}, "1 or 3"),
        (np.zeros((0, 1, 4, 4), np.uint8), {}, "N >= 1"),
        (np.zeros((2, 1, 4, 4), np.uint8), {"row_titles": ["a", "b"]}, "row_titles has 2 entries"),
        (np.zeros((2, 1, 4, 4), np.uint8), {"column_titles": ["a"]}, "column_titles has 1 entries"),
    ],
)
def test_grid_refuses_what_it_cannot_lay_out(images: np.ndarray, options: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        pictures.grid(images, columns=2, **options)


def test_png_files_carry_pixels_and_nothing_else(tmp_path: Path) -> None:
    image = pictures.grid(colours(1), columns=1)
    image.info["Software"] = "somebody"
    pictures.save_png(image, tmp_path / "a.png")
    pictures.save_png(pictures.grid(colours(1), columns=1), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    read = Image.open(tmp_path / "a.png")
    assert read.info == {}
    assert np.array_equal(np.asarray(read), np.asarray(image))


@pytest.mark.parametrize("channels", [1, 3])
def test_tile_png_keeps_the_image(channels: int, tmp_path: Path) -> None:
    image = colours(1)[0, :channels]
    (tmp_path / "tile.png").write_bytes(pictures.tile_png(image))
    read = np.asarray(Image.open(tmp_path / "tile.png"))
    assert np.array_equal(read if channels == 3 else read[..., None], image.transpose(1, 2, 0))


def test_animation_keeps_every_frame_and_rests_on_the_last(tmp_path: Path) -> None:
    frames = [pictures.grid(np.roll(colours(4), k, axis=0), columns=2) for k in range(3)]
    for name in ("a.png", "b.png"):
        pictures.save_animation(frames, tmp_path / name, frame_ms=50)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    durations = []
    with Image.open(tmp_path / "a.png") as read:
        assert (read.n_frames, read.info["loop"]) == (3, 0)
        for number, frame in enumerate(frames):
            read.seek(number)
            assert np.array_equal(np.asarray(read.convert("RGBA")), np.asarray(frame))
            durations.append(read.info["duration"])
    assert durations[:2] == [50, 50]
    assert durations[2] > 1000


def test_shrunk_averages_squares_of_four() -> None:
    image = np.array([[[0, 4, 10, 10], [4, 8, 10, 10]]], np.uint8)
    assert np.array_equal(pictures.shrunk(image, 2), [[[4, 10]]])
    assert pictures.shrunk(image, 4) is image
    assert pictures.shrunk(np.zeros((2, 3, 64, 64), np.uint8), 16).shape == (2, 3, 16, 16)
    assert pictures.shrunk(np.zeros((15, 15), np.uint8), 8).shape == (15, 15), "an odd side has no halves"
