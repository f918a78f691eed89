"""A training of a ControlNet learns to follow its maps: images are random blocks, which only the map shows."""

from __future__ import annotations

import numpy as np
import torch

from models.images.pixels import to_uint8
from models.networks.control_maps import ControlSpec, agreement, as_input
from models.networks.controlnet import Controlled
from models.networks.network import predictor
from models.noise.samplers import Sampling, SeededNoise, denoiser, sample
from models.pipeline import load_pipeline
from tasks.formats import latents
from tests.support.train_inputs import small_grids, train_here, write_inputs, write_params

SPEC = ControlSpec("colour", colour_cells=4)
COUNT = 32


def test_images_follow_their_own_map_and_not_another(tmp_path, monkeypatch, migrated_database):
    write_inputs(tmp_path, "text", 512, control=True)
    rate = {"learning_rate": 0.01, "warmup_steps": 10, "lr_schedule": "cosine", "condition_dropout": 0.1}
    often = {
        "log_every": 30,
        "sample_every": 100,
        "checkpoint_every": 100,
        "ema": ["decay-0.9"],
        "pipeline_ema": "decay-0.9",
    }
    phases = {"steps": 100, "full_steps": 20, "control_dropout": 0.1, "batch_size": 32}
    write_params(tmp_path, "text", control=True, **rate, **often, **phases)
    with small_grids():
        train_here(tmp_path, monkeypatch, migrated_database)
    model, held_out = load_pipeline(tmp_path / "pipeline"), latents.load_latents(tmp_path / "latents", "test")
    maps = np.concatenate([part["control"] for part in latents.open_shards(tmp_path / "latents", "test")])[:COUNT]
    condition = held_out.texts[held_out.captions[:COUNT, 0]].float()

    def drawn(control: np.ndarray) -> np.ndarray:
        given = as_input(torch.tensor(control), 8, 8)
        predict = predictor(Controlled(model.network, model.control), control=given)
        noise, sampling = SeededNoise(range(COUNT), (1, 8, 8)), Sampling("ddim", 8)
        denoise = denoiser(predict, model.scheduler, sampling, condition)
        with torch.inference_mode():
            return to_uint8(sample(denoise, lambda: torch.from_numpy(noise()), model.scheduler, sampling).numpy())

    own = agreement(SPEC, maps, drawn(maps)).mean()
    shuffled = agreement(SPEC, maps, drawn(np.roll(maps, 1, axis=0))).mean()
    assert own > 0.7 and own - shuffled > 0.15, (own, shuffled)
