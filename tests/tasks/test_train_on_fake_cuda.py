"""Training on a stand-in for a GPU: every tensor is on the device that it must be on, and no step waits for it."""

from __future__ import annotations

import pytest

from tests.support.fake_cuda import fake_cuda
from tests.support.train_inputs import small_grids, write_inputs

RARELY = {name: 100 for name in ("steps", "log_every", "checkpoint_every", "sample_every")} | {"compile": False, "ema_snapshots": 0, "warmup_steps": 0}
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
