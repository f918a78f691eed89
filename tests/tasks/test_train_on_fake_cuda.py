"""Training on a stand-in for a GPU: every tensor is on the device that it must be on, and no step waits for it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from models import tuned_text
from models.networks.network import build
from models.noise.schedules import path_of
from models.optimization.timesteps import DENSITIES, Density, Timesteps
from tasks.formats import latents
from tasks.params import DiffusionParams
from tasks.training.batches import Batches, Conditioning, DrawConfig
from tasks.training.prior_mix import PriorMix
from tasks.training.run import Objective
from tasks.training.stores import Resident, Store, Streamed
from tests.support.fake_cuda import fake_cuda
from tests.support.tiny_networks import NETWORKS, both_encoders, encoder
from tests.support.train_inputs import write_inputs

SELDOM = dict.fromkeys(("steps", "log_every", "checkpoint_every", "sample_every"), 100)
RARELY = SELDOM | {"compile": False, "ema_snapshots": 0, "warmup_steps": 0}
BUCKETS = ((8, 8), (8, 16))
DISTIL = {"after": 1, "d": 10}


@pytest.mark.parametrize(
    ("conditioning", "options"),
    [
        ("label", {"gradient_accumulation": 2, "precision": "bf16", "data_on_device": "device", "dropout": 0.1}),
        ("text", {"data_on_device": "device", "precision": "fp16"}),
        ("text", {"data_on_device": "stream", "precision": "tf32", "channels_last": True}),
        ("none", {"optimizer": "muon", "ema_every": 2, "gradient_checkpointing": True, "precision": "bf16"}),
        ("label", {"architecture": "dit", "optimizer": "muon", "distil": DISTIL, "dropout": 0.1}),
        ("text", {"architecture": "dit", "gradient_checkpointing": True, "guide_step": 50}),
        ("text", {"lora_rank": 2, "full_steps": 1, "precision": "bf16"}),
        ("text", {"control": True, "control_dropout": 0.1, "full_steps": 1, "precision": "bf16"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_a_step_never_waits_for_the_gpu(prepared, tmp_path, conditioning, options):
    from tasks import train

    write_inputs(tmp_path, conditioning, control="control" in options)
    with fake_cuda() as fake:
        run = prepared(conditioning, **RARELY, **options)
        assert {value.device.type for value in run.network.state_dict().values()} == {"cuda"}
        first = 2  # after the switch from the base to the adapter, the ControlNet or the tuning
        train.fit(run, None, [], until=first)
        few = fake.waits_during(lambda: train.fit(run, None, [], until=first + 1))
        many = fake.waits_during(lambda: train.fit(run, None, [], until=first + 3))
    assert many == few


@pytest.mark.parametrize(("conditioning", "steps"), [("label", (2, 3)), ("text", (2,))])
def test_a_whole_training(trained, tmp_path, conditioning, steps):
    """Rows, held-out losses, sample grids, checkpoints, the pipeline, and more steps from a checkpoint."""
    often = {"log_every": 1, "checkpoint_every": 1, "sample_every": 2, "warmup_steps": 1, "compile": False}
    for until in steps:
        with fake_cuda():
            trained(conditioning=conditioning, **often, steps=until)
        assert (tmp_path / "report" / "history.csv").read_text().count("\n") == 1 + until


def test_buckets(prepared, tmp_path):
    from tasks import train

    write_inputs(tmp_path, buckets=BUCKETS)
    with fake_cuda() as fake:
        run = prepared(**RARELY)
        few = fake.waits_during(lambda: train.fit(run, None, [], until=1))
        many = fake.waits_during(lambda: train.fit(run, None, [], until=4))
    assert many == few


PARAMS = DiffusionParams(schedule="cosine", prediction="v_prediction", timesteps=50, loss_weighting="min_snr")
ROWS, GPU = 24, torch.device("cuda")
OPTIONS = {"batch_size": 8, "seed": 0, "horizontal_flip": True, "condition_dropout": 0.5, "parts": 2}


def stored(kind: type[Store], **columns: np.ndarray) -> Store:
    """Store latents of one channel with further columns."""
    bits = np.zeros((ROWS, 2, 1, 8, 8), np.int16)
    assert latents.as_tensor(bits).dtype == torch.bfloat16
    return kind([{"mean": bits, "std": bits, **columns}], GPU)


@pytest.mark.parametrize("kind", [Resident, Streamed])
@pytest.mark.parametrize("text", [None, "embeddings", "ids", "sdxl"])
def test_no_batch_waits(fake_gpu, kind, text):
    captions = {"captions": np.zeros((ROWS, 3), np.int32), "sizes": np.zeros((ROWS, 6), np.int32)}
    columns = captions if text else {"labels": np.zeros(ROWS, np.int64)}
    conditioning = {
        None: lambda: Conditioning(classes=3),
        "embeddings": lambda: _conditioning(kind, embeddings=np.zeros((4, 2, 16), np.int16)),
        "ids": lambda: _conditioning(kind, encoder(16).on("cuda"), ids=np.zeros((4, 2), np.int32)),
        "sdxl": lambda: _conditioning(kind, both_encoders().on("cuda"), ids=np.zeros((4, 2, 2), np.int32)),
    }[text]()
    for path, density in itertools.product(("cosine", "rectified_flow"), DENSITIES):
        timesteps = Timesteps(path_of(path, 50), GPU, Density(density, shift=2.0))
        batches = Batches(stored(kind, **columns), conditioning, DrawConfig(timesteps=timesteps, **OPTIONS), GPU)
        batches.draw(0)
        for part in (0, 1):
            assert fake_gpu.waits_during(partial(batches.draw, 1, part)) == []
        drawn = batches.draw(2)
        assert {value.device.type for value in (drawn.x0, drawn.eps, drawn.t, drawn.condition)} == {"cuda"}


def _conditioning(kind: type[Store], text=None, **columns: np.ndarray) -> Conditioning:
    pooled = getattr(text, "pooled", None)
    null = torch.zeros(2, 16) if pooled is None else torch.zeros(3, 24)
    return Conditioning(texts=kind([columns], GPU), text_encoder=text, null_text=null, pooled=pooled)


def test_no_step_of_dreambooth_waits(fake_gpu):
    """The subject's and the class images, with the text encoder in the network."""
    columns, ids = {"captions": np.zeros((ROWS, 1), np.int32)}, np.zeros((2, 2), np.int64)
    conditioning = Conditioning(texts=Resident([{"ids": ids}], GPU), null_text=torch.zeros(2, dtype=torch.int64))
    timesteps = Timesteps(path_of("cosine", 50), GPU)
    config = DrawConfig(timesteps=timesteps, **OPTIONS)
    mix = PriorMix(*(Batches(stored(Resident, **columns), conditioning, config, GPU) for _ in range(2)), weight=0.5)
    network = build(NETWORKS["text_unet"])
    tuned_text.attach(network, encoder(16).model)
    network.to("cuda")
    objective = Objective(PARAMS, timesteps)

    def step() -> None:
        objective(network, mix.draw(1)).mean().backward()

    mix.draw(0)
    assert fake_gpu.waits_during(step) == []
    assert all(parameter.grad.is_cuda for parameter in network.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("lower", ["no", "bf16"])
def test_every_network_trains(fake_gpu, kind, lower):
    """A frozen U-Net is kept in bfloat16 on a GPU, beside a ControlNet or an adapter in float32."""
    config = NETWORKS[kind]
    network = build(replace(config, lora_rank=2) if kind == "sdxl" else config).to("cuda")
    if kind in ("control", "sdxl"):
        network.train_adapter(train=True)
        if lower == "bf16":
            network.freeze_in(torch.bfloat16)
    x = torch.randn(4, 1 + getattr(config, "context_channels", 0), 8, 8, device="cuda")
    inputs = [torch.ones(4, dtype=torch.int64, device="cuda"), _condition(config)]
    if kind == "control":
        inputs.append(torch.zeros(4, 3, 16, 16, device="cuda"))

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=lower == "bf16"):
            network(x, *inputs).float().square().mean().backward()

    assert fake_gpu.waits_during(step) == []
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert trained and all(parameter.dtype == torch.float32 for parameter in trained)
    assert any(parameter.grad is not None for parameter in trained)


def _condition(config) -> torch.Tensor:
    width = getattr(config, "cross_attention_dim", None) or getattr(config, "text_width", None)
    if width is None:
        return torch.ones(4, dtype=torch.int64, device="cuda")
    return torch.zeros(4, 3 if getattr(config, "pooled", None) else 2, width, device="cuda")
