"""Interpolation: the arc keeps the norm, and its ends are the samples that it lies between."""

from __future__ import annotations

import numpy as np
import pytest

from models.interpolation import Pair, between_conditions, between_noises, slerp
from models.networks.dit import DiT, DiTConfig
from models.noise import schedules
from models.noise.samplers import Sampling, SchedulerConfig
from models.pipeline import Pipeline, PipelineInfo, load_pipeline
from tests.support import model_outputs
from tests.support.networks import randomised

SHARES = (0.0, 0.25, 1.0)
PAIRS = [Pair((3, 4), (0, 2)), Pair((5, 6), (1, 0))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pipeline]:
    folder = tmp_path_factory.mktemp("models")
    for kind in ("label", "none"):
        model_outputs.write_pipeline(folder / kind, kind)
    return {kind: load_pipeline(folder / kind) for kind in ("label", "none")}


def test_the_arc_has_closed_forms() -> None:
    first, second = np.array([2.0, 0.0]), np.array([0.0, 2.0])
    arc = slerp(first, second, (0, 1 / 3, 0.5, 1))
    assert np.allclose(arc, [[2, 0], [3**0.5, 1], [2**0.5, 2**0.5], [0, 2]])
    assert np.allclose(slerp(first, 3 * first, (0, 0.5, 1)), [[2, 0], [4, 0], [6, 0]])
    noise = np.random.default_rng(0).standard_normal((2, 1, 32, 32), dtype=np.float32)
    middle = slerp(*noise, (0.5,))[0]
    assert middle.dtype == np.float32
    assert np.linalg.norm(middle) == pytest.approx(np.linalg.norm(noise[0]), rel=0.05)
    assert np.linalg.norm(noise.mean(axis=0)) < 0.8 * np.linalg.norm(noise[0])


@pytest.mark.parametrize(
    "sampling", [Sampling("ddim", 4, guidance_scale=2.0), Sampling("ddpm", 4)], ids=["ddim", "ddpm"]
)
def test_ends_are_the_samples_themselves(models: dict[str, Pipeline], sampling: Sampling) -> None:
    model = models["label"]
    images = between_noises(model, PAIRS, SHARES, sampling, 4)
    assert images.shape == (2, 3, 1, 8, 8)
    assert np.allclose(images[:, 0], model.sample([3, 5], [0, 1], sampling), atol=1e-5)
    if sampling.sampler == "ddim":  # DDPM's further noise is that of the first seed
        assert np.allclose(images[:, -1], model.sample([4, 6], [0, 1], sampling), atol=1e-5)
    conditions = between_conditions(model, PAIRS, SHARES, sampling, 4)
    assert np.allclose(conditions[:, 0], model.sample([3, 5], [0, 1], sampling), atol=1e-5)
    assert np.allclose(conditions[:, -1], model.sample([3, 5], [2, 0], sampling), atol=1e-5)
    for row in (*images, *conditions):
        assert np.abs(row[0] - row[1]).max() > 1e-4 and np.abs(row[2] - row[1]).max() > 1e-4


def test_labels_are_interpolated_with_a_guide_and_leave_the_network_as_it_was(models: dict[str, Pipeline]) -> None:
    model = models["label"]
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    auto = Sampling("ddim", 3, guidance_scale=2.0, guidance="auto")
    images = between_conditions(model, PAIRS, SHARES, auto, 100)
    assert np.allclose(images[:, -1], model.sample([3, 5], [2, 0], auto), atol=1e-5)
    after = model.network.state_dict()
    assert before.keys() == after.keys() and all((before[name] == after[name]).all() for name in before)


def test_the_embeddings_of_a_transformer_are_interpolated() -> None:
    config = DiTConfig(size=8, channels=1, patch_size=2, width=16, depth=2, heads=2, conditions=4)
    info = PipelineInfo("label", 1, 8, "cosine", 20, "v_prediction", "", ["a", "b", "c"], null_label=3)
    scheduler = SchedulerConfig(schedules.path_of("cosine", 20), "v_prediction")
    model, sampling = Pipeline(randomised(DiT(config)), scheduler, info), Sampling("ddim", 3, guidance_scale=2.0)
    images = between_conditions(model, PAIRS, SHARES, sampling, 4)
    assert np.allclose(images[:, -1], model.sample([3, 5], [2, 0], sampling), atol=1e-5)
    assert np.abs(images[:, 1] - images[:, 0]).max() > 1e-4


def test_an_unconditional_model_has_noises_alone(models: dict[str, Pipeline]) -> None:
    pairs, sampling = [Pair((3, 4), None)], Sampling("ddim", 3)
    images = between_noises(models["none"], pairs, SHARES, sampling, 8)
    assert np.allclose(images[0, [0, 2]], models["none"].sample([3, 4], sampling=sampling), atol=1e-5)
    with pytest.raises(ValueError, match="no conditions"):
        between_conditions(models["none"], pairs, SHARES, sampling, 8)
