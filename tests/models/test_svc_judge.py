"""An independent judge of the digits that `make repro` drew: a support vector machine on the raw 8x8 pixels.

It shares nothing with the judge that the chain trains: neither network, nor resolution, nor library.
"""

from pathlib import Path

import numpy as np
import pytest

from models.images.pixels import to_uint8
from models.noise.samplers import Sampling
from models.pipeline import Pipeline, load_pipeline
from tasks import params
from tasks.params import ImageParams, Params
from tasks.pictures.images import load_pixels
from tasks.pictures.index import read_index

ROOT = Path(__file__).resolve().parents[2]
RAW = ImageParams(resolution=8, channels=1)
AGREEMENT = 0.9


def area_mean(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 [N, 1, S, S] -> float [N, size * size], each the mean of a square."""
    count, _, side, _ = pixels.shape
    step = side // size
    return pixels.reshape(count, size, step, size, step).mean(axis=(2, 4)).reshape(count, -1)


@pytest.fixture(scope="module")
def digits() -> tuple[Params, Pipeline]:
    """Parameters and pipeline of a whole run of the digits preset in this work tree."""
    images, pipeline = ROOT / "data" / "images", ROOT / "outputs" / "pipeline"
    if not (pipeline / "afterimage.json").exists() or not (images / "index.json").exists():
        pytest.skip("needs the outputs of 'make repro' in this work tree")
    chosen = params.load(ROOT / "params.yaml")
    loaded = load_pipeline(pipeline)
    if read_index(images).source != "digits" or loaded.info.conditioning != "label":
        pytest.skip("the outputs in this work tree are not those of the preset 'digits'")
    return chosen, loaded


def test_an_independent_judge_reads_the_digits_that_were_asked_for(digits: tuple[Params, Pipeline]) -> None:
    from sklearn.svm import SVC

    chosen, pipeline = digits
    train, held_out = (load_pixels(ROOT / "data" / "images", split, RAW) for split in ("train", "test"))
    judge = SVC().fit(area_mean(train.pixels, 8), train.labels)
    assert judge.score(area_mean(held_out.pixels, 8), held_out.labels) >= 0.95

    protocol = chosen.evaluate
    labels = np.arange(protocol.n_accuracy) % len(pipeline.info.classes)
    seeds = range(protocol.seed, protocol.seed + protocol.n_accuracy)
    drawn = to_uint8(
        pipeline.sample(
            seeds,
            labels.tolist(),
            Sampling(protocol.sampler, protocol.steps, guidance_scale=protocol.guidance_scale),
            batch_size=128,
        )
    )
    assert judge.score(area_mean(drawn, 8), labels) >= AGREEMENT
