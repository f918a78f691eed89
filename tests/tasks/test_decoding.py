"""Decoding: perceptual hashes, thumbnails and orientation of single images."""

import io

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from tasks.pictures import decoding
from tests.support import bad_inputs
from tests.support.data_inputs import picture


def test_the_perceptual_hash_compares_low_frequencies_with_their_median():
    from scipy.fft import dctn

    pictures = np.random.default_rng(0).integers(0, 256, (50, 32, 32), np.uint8)
    low = dctn(pictures.astype(float), axes=(1, 2))[:, :8, :8].reshape(50, 64)
    expected = np.packbits(low > np.median(low, axis=1, keepdims=True), axis=1)
    found = np.array([list(bytes.fromhex(text)) for text in decoding.perceptual_hashes(pictures)], np.uint8)
    assert np.unpackbits(expected ^ found).sum() <= 2  # a sign may turn where a frequency is all but the median


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparent_thumbnails_are_composited_on_white(mode):
    picture = PIL.Image.radial_gradient("L").resize((96, 64))
    image = PIL.Image.merge("RGBA", [picture, picture.rotate(90), picture, picture.rotate(180)])
    image = image.quantize(64) if mode == "P" else image.convert(mode)
    white = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    expected = np.asarray(white.convert("L").resize((32, 32), PIL.Image.Resampling.BILINEAR))
    assert np.abs(decoding.thumbnail(image).astype(int) - expected).max() <= 2


@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_upright_as_by_pillow(orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    lying = decoding.open_image(
        bad_inputs.saved(PIL.Image.radial_gradient("L").crop((0, 9, 99, 70)), "PNG", exif=exif), 9999
    )
    upright = PIL.ImageOps.exif_transpose(lying)
    assert np.array_equal(decoding.to_mode(lying, 1), upright)
    assert decoding.upright_size(lying) == upright.size[::-1]


def test_a_multi_picture_jpeg_of_a_phone_is_not_an_animation():
    first, second = (PIL.Image.open(io.BytesIO(picture(seed))) for seed in (1, 2))
    file = io.BytesIO()
    first.save(file, "MPO", save_all=True, append_images=[second])
    assert decoding.open_image(file.getvalue(), 10_000).size == (12, 12)
