"""Masks and what is done with them: shapes, latent resolution, compositing; and `edit` on a pipeline of pixels."""

import numpy as np
import pytest

from models import masks
from models.editing import edit
from models.images.pixels import from_uint8, to_uint8
from models.networks.unet import UNet, UNetConfig
from models.noise.paths import DiffusionPath
from models.noise.samplers import Sampling, SchedulerConfig
from models.noise.schedules import alpha_bar, betas
from models.pipeline import Pipeline, PipelineInfo
from tests.support.networks import randomised

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8), dtype=np.uint8)
DDIM = Sampling("ddim", 5)


@pytest.fixture(scope="module")
def pipeline():
    network = randomised(UNet(UNetConfig(8, 1, (8, 16), (False, True), 1, 4, 8, conditions=4)))
    info = PipelineInfo("label", 1, 8, "cosine", 50, "v_prediction", "", ["a", "b", "c"], null_label=3)
    return Pipeline(network, SchedulerConfig(DiffusionPath(alpha_bar(betas("cosine", 50))), "v_prediction"), info)


def test_masks_cover_what_they_say():
    assert masks.rectangle(8, 12, 2, 1, 5, 3).sum() == 6 and masks.rectangle(8, 12, 2, 1, 5, 3)[1, 2]
    assert masks.centre(8, 12).sum() == 4 * 6 and not masks.centre(8, 12)[1].any()
    assert masks.half(8, 12)[:, 6:].all() and not masks.half(8, 12)[:, :6].any()
    with pytest.raises(ValueError, match=r"rectangle 5,1,5,3 .* is empty or leaves an image of 12 x 8 pixels"):
        masks.rectangle(8, 12, 5, 1, 5, 3)


@pytest.mark.parametrize("side", [8, 16, 64, 512])
def test_strokes_follow_their_seed_and_leave_something(side):
    drawn = [masks.strokes(side, side, seed) for seed in range(20 if side < 512 else 1)]
    assert np.array_equal(drawn[0], masks.strokes(side, side, 0))
    assert all(0.05 < mask.mean() < 0.75 for mask in drawn)
    if len(drawn) > 1:
        assert len({mask.tobytes() for mask in drawn}) == len(drawn)


def test_a_latent_is_painted_if_any_of_its_pixels_is():
    mask = np.zeros((1, 8, 8), bool)
    mask[0, 3, 3] = True  # not the top left pixel of its latent
    wanted = np.zeros((1, 1, 4, 4), np.float32)
    wanted[0, 0, 1, 1] = 1
    assert np.array_equal(masks.at_resolution(mask, 4, 4), wanted)
    assert np.array_equal(masks.at_resolution(mask, 8, 8)[:, 0], mask)


def test_compositing_keeps_every_level_and_closes_a_seam_without_looking_under_the_mask():
    pixels = np.repeat(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16), 2, axis=0)
    mask = np.repeat(masks.half(16, 16)[None], 2, axis=0)
    pixels[1][:, mask[1]] = 7  # only the hidden part differs
    drawn = from_uint8(pixels[[0, 0]]) - 0.3  # as if an autoencoder had shifted the colour
    blended = masks.composite(pixels, drawn, mask, feather=3)
    assert blended.dtype == np.float32
    assert np.array_equal(to_uint8(blended)[:, :, ~mask[0]], pixels[:, :, ~mask[0]])
    assert np.array_equal(blended[0][:, mask[0]], blended[1][:, mask[1]])
    correction = (blended - drawn)[0, 0, 8]
    assert np.allclose(correction[8:], [0.225, 0.15, 0.075, 0, 0, 0, 0, 0], atol=1e-6)
    assert np.array_equal(masks.composite(pixels, drawn, mask, 0)[:, :, mask[0]], drawn[:, :, mask[0]])


def test_an_edit_keeps_the_known_region_exactly_and_depends_on_its_own_seed(pipeline):
    mask = np.stack([masks.half(8, 8), masks.centre(8, 8), np.zeros((8, 8), bool)])
    draw = {"mask": mask, "labels": [0, 1, 2], "sampling": DDIM}
    edited = edit(pipeline, [1, 2, 3], PIXELS, 0.8, **draw)
    assert edited.dtype == np.float32 and edited.shape == PIXELS.shape
    kept = np.broadcast_to(~mask[:, None], PIXELS.shape)
    assert np.array_equal(to_uint8(edited)[kept], PIXELS[kept])
    assert not np.array_equal(to_uint8(edited)[~kept], PIXELS[~kept])
    assert np.array_equal(to_uint8(edited)[2], PIXELS[2])  # nothing is painted anew
    alone = edit(pipeline, [2], PIXELS[1:2], 0.8, mask=mask[1], labels=[1], sampling=DDIM)
    assert np.allclose(alone[0], edited[1], atol=1e-5)
    assert np.allclose(edit(pipeline, [1, 2, 3], PIXELS, 0.8, batch_size=2, **draw), edited, atol=1e-5)


def test_an_empty_mask_gives_the_image_back_and_a_full_one_plain_samples(pipeline):
    draw = {"labels": [0, 1, 2], "sampling": DDIM}
    empty = edit(pipeline, [1, 2, 3], PIXELS, 1.0, mask=np.zeros((8, 8), bool), **draw)
    assert np.array_equal(to_uint8(empty), PIXELS)
    full = edit(pipeline, [1, 2, 3], PIXELS, 1.0, mask=np.ones((8, 8), bool), **draw)
    assert np.array_equal(full, pipeline.sample([1, 2, 3], [0, 1, 2], DDIM))


def test_more_strength_changes_more(pipeline):
    changes = [
        np.abs(edit(pipeline, [1, 2, 3], PIXELS, s, labels=[0, 1, 2], sampling=DDIM) - from_uint8(PIXELS)).mean()
        for s in (0.2, 0.6, 1.0)
    ]
    assert changes == sorted(changes) and changes[0] < 0.5 * changes[2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask": np.ones((8, 9), bool)}, "the mask is 9 x 8 pixels and the image 8 x 8; give a mask of the same"),
        ({"mask": np.ones((2, 8, 8), bool)}, r"shape \(2, 8, 8\) for 3 images; give one for all or one for each"),
        ({"mask": np.ones((8, 8), np.uint8)}, "dtype uint8; give booleans"),
        ({"images": PIXELS.astype(np.float32)}, "the given images are float32"),
        ({"images": PIXELS[:, :, :4]}, r"uint8 \[3, 1, 4, 8\], and this model and 3 seeds need uint8 \[3, 1, 8, 8\]"),
        ({"strength": 0.1}, "strength 0.1 takes none of 5 steps"),
        ({"strength": 0}, "must lie above 0"),
        ({"resampling": 2}, "give a mask"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(pipeline, given, message):
    arguments = {"images": PIXELS, "strength": 0.8, "labels": [0, 1, 2], "sampling": DDIM, **given}
    with pytest.raises(ValueError, match=message):
        edit(pipeline, [1, 2, 3], **arguments)
