"""Drawing on a stand-in for a GPU: every tensor is on the device that it must be on, and no step waits for it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from models import denoising, editing, interpolation
from models.attention_maps import recording
from models.networks import precision
from models.noise.samplers import OF_DIFFUSION, OF_FLOW, Sampling
from tests.support.tiny_networks import NETWORKS, SIZE, made

if TYPE_CHECKING:
    from models.pipeline import Pipeline

LABELS, PROMPTS = [0, 1, 2], ["a dog", "", "a cat"]


def drawn(fake, model: Pipeline, sampling: Sampling, **options) -> list[str]:
    """Draw three images twice, with more steps the second time, which must not make the host wait more often."""
    given = {"prompts": PROMPTS} if model.text else {"labels": LABELS}
    few = fake.waits_during(lambda: model.sample([1, 2, 3], sampling=sampling, **given, **options))
    more = replace(sampling, steps=2 * sampling.steps)
    assert fake.waits_during(lambda: model.sample([1, 2, 3], sampling=more, **given, **options)) == few
    return few


@pytest.mark.parametrize(
    ("flow", "sampler"), [*((False, name) for name in OF_DIFFUSION), *((True, name) for name in OF_FLOW)]
)
def test_no_step_of_a_sampler_waits(fake_gpu, flow, sampler):
    model = made("dit", flow).on("cuda")
    sampling = Sampling(sampler, 3, eta=0.5 if sampler == "ddim" else 0.0)
    assert len(drawn(fake_gpu, model, sampling)) < 5
    for kind in ("classifier_free", "auto"):
        drawn(fake_gpu, model, replace(sampling, guidance_scale=2.0, guidance=kind, guidance_interval=(0.2, 5)))


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("lower", ["no", "bf16"])
def test_every_network_draws(fake_gpu, kind, lower):
    model = precision.in_precision(made(kind, latent=True), lower).on("cuda")
    options = {}
    if kind == "inpainting":
        options["context"] = torch.zeros(3, 2, SIZE, SIZE)
    if kind == "control":
        options["control"] = np.zeros((1, 1, 2 * SIZE, 2 * SIZE), np.uint8)
    drawn(fake_gpu, model, Sampling("ddim", 2, guidance_scale=2.0), **options)


def test_labels_are_checked_without_waiting(fake_gpu):
    """One copy of the labels to the GPU, one of the first noise, and one of the images to the host."""
    assert len(drawn(fake_gpu, made("dit").on("cuda"), Sampling("ddim", 2))) == 3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sampler", OF_DIFFUSION)
def test_no_step_of_an_edit_waits(fake_gpu, sampler, masked):
    model = made("dit").on("cuda")
    images, mask = np.zeros((3, 1, SIZE, SIZE), np.uint8), np.arange(SIZE**2).reshape(SIZE, SIZE) < 30
    counts = []
    for steps in (4, 8):
        sampling = Sampling(sampler, steps, eta=1.0 if sampler == "ddim" else 0.0)
        given = {"mask": mask, "resampling": 2} if masked else {}
        call = partial(editing.edit, model, [1, 2, 3], images, 0.5, labels=LABELS, sampling=sampling, **given)
        counts.append(fake_gpu.waits_during(call))
    assert counts[0] == counts[1]


def test_an_inpainting_network_edits(fake_gpu):
    model = made("inpainting", latent=True).on("cuda")
    images, mask = np.zeros((3, 1, 2 * SIZE, 2 * SIZE), np.uint8), np.ones((2 * SIZE, 2 * SIZE), bool)
    editing.edit(model, [1, 2, 3], images, 1.0, mask, prompts=PROMPTS, sampling=Sampling("ddim", 2))


@pytest.mark.parametrize("kind", ["unet", "dit", "text_dit"])
def test_no_step_of_an_interpolation_waits(fake_gpu, kind):
    model, pairs = made(kind).on("cuda"), [interpolation.Pair((1, 2), (0, 1)), interpolation.Pair((3, 4), (1, 2))]
    for between in (interpolation.between_noises, interpolation.between_conditions):
        counts = [
            fake_gpu.waits_during(partial(between, model, pairs, [0.0, 0.5, 1.0], Sampling("ddpm", steps), 4))
            for steps in (2, 4)
        ]
        assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", ["unet", "sdxl", "dit", "text_dit"])
def test_attention_maps(fake_gpu, kind):
    model = made(kind).on("cuda")
    given = {"prompts": PROMPTS} if model.text else {"labels": LABELS}
    with recording(model.network) as recorder:
        model.sample([1, 2, 3], sampling=Sampling("ddim", 2), **given)
    assert recorder.maps and all(each.weights.device.type == "cpu" for each in recorder.maps)


def test_the_error_by_timestep_is_read_once(fake_gpu):
    model, pixels = made("unet", latent=True).on("cuda"), np.zeros((3, 1, 2 * SIZE, 2 * SIZE), np.uint8)
    counts = [
        fake_gpu.waits_during(
            partial(denoising.error_by_timestep, model, pixels, {"labels": LABELS}, timesteps, 0, batch_size=3)
        )
        for timesteps in ([1, 5], [1, 5, 9, 13])
    ]
    assert counts[0] == counts[1]
