"""A network that FSDP2 shards between two processes: trained as in one, and continued in the same bytes."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tasks.runtime.errors import StageError
from tests.support.train_inputs import prepare_here, write_inputs, write_params

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
OPTIONS = {"steps": 100, "log_every": 100, "checkpoint_every": 100, "sample_every": 100}
OPTIONS |= {"ema": ["decay-0.5", "std-0.10"], "pipeline_ema": "decay-0.5", "warmup_steps": 0}
CASES = {
    "adamw": {"gradient_accumulation": 2},
    "muon": {"optimizer": "muon"},
    "dit": {"architecture": "dit", "precision": "bf16"},
}
DRILLS = {
    "text": {"conditioning": "text", "precision": "bf16", "channels_last": True},
    "lora": {"conditioning": "text", "lora_rank": 2},
    "control": {"conditioning": "text", "control": True, "control_dropout": 0.5, "ema_snapshots": 0},
    "text_dit": {"conditioning": "text", "architecture": "dit", "optimizer": "muon"},
    "checkpointing": {"gradient_checkpointing": True},
    "compiled": {"compile": True},
    "distil": {"distil": {"after": 1}, "lr_schedule": "constant", "ema_snapshots": 0},
}


def write(folder: Path, conditioning: str = "label", control: bool = False, **options) -> None:
    folder.mkdir()
    write_inputs(folder, conditioning, control=control)
    if control or "lora_rank" in options:
        base = folder / "base"  # named and not read, because `prepare_here` starts from random weights
        base.mkdir()
        (base / "diffusion_pytorch_model.safetensors").write_bytes(b"")
        options["init_from"] = str(base)
    write_params(folder, conditioning, control=control, **OPTIONS | options)


def joined(run) -> None:
    """Let one process draw what two draw together: each its own half of a batch."""
    import torch

    from tasks.training.batches import Batch, Batches

    config = run.batches.config
    halves = [
        Batches(
            run.batches.store,
            run.batches.conditioning,
            replace(config, batch_size=config.batch_size // 2, process=process, processes=2),
            run.accelerator.device,
        )
        for process in range(2)
    ]

    def draw(step, part=0):
        pairs = zip(*(vars(half.draw(step, part)).values() for half in halves), strict=True)
        return Batch(*(None if pair[0] is None else torch.cat(pair) for pair in pairs))

    run.batches.draw = draw


def in_one_process(folder: Path, monkeypatch, database: Path) -> tuple[list[str], dict, dict]:
    """Train in one process; returns the names of the averages, the weights at first, and the state at the end."""
    from tasks import train
    from tasks.training.run import gather_tallies, snapshot
    from tests.support.sharded_training import compile_eagerly, flat, start_nowhere_at_zero

    start_nowhere_at_zero(monkeypatch)
    compile_eagerly(monkeypatch)
    run = prepare_here(folder, monkeypatch, database)
    joined(run)
    first = {name: value.clone() for name, value in run.network.state_dict().items()}
    train.fit(run, None, [], until=STEPS)
    return list(run.averages), first, flat(snapshot(run, gather_tallies(run)).tensors)


def relative_difference(ours: dict, theirs: dict, first: dict, group: str) -> float:
    """Return the mean difference of a group of weights, relative to the mean change by the training."""
    import torch

    names = [key.partition("|")[2] for key in theirs if key.startswith(f"{group}|")]
    a, b = (torch.cat([state[f"{group}|{name}"].flatten() for name in names]) for state in (ours, theirs))
    before = torch.cat([first[name].flatten() for name in names])
    return ((a - b).abs().mean() / (b - before).abs().mean()).item()


def compare(cases: dict, tmp_path: Path, monkeypatch, database: Path) -> None:
    import torch

    for name, options in cases.items():
        write(tmp_path / name, **options)
        (tmp_path / name / "mlflow.db").write_bytes(database.read_bytes())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = [str(tmp_path / name) for name in cases]
    command = [sys.executable, "-m", "tests.support.sharded_training", str(port), str(STEPS), *folders]
    on_gpus = torch.cuda.device_count() > 1
    environment = os.environ if on_gpus else os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, options in cases.items():
        folder = tmp_path / name
        whole, continued = (load_file(folder / f"{kind}.safetensors") for kind in ("whole", "continued"))
        assert whole.keys() == continued.keys()
        if not on_gpus:
            assert all(torch.equal(value, continued[key]) for key, value in whole.items()), name
        counts = json.loads((folder / "counts.json").read_text())
        assert 0.4 < counts["share"] < 0.6
        assert counts["waits"][0] == counts["waits"][1] > 0, "only signals and checkpoints wait, and no step"
        averages, first, alone = in_one_process(folder, monkeypatch, database)
        assert whole.keys() == alone.keys()
        for group in ("model", *averages):
            tolerance = 0.05 if options.get("precision") == "bf16" else 2e-3
            for state in (whole, continued):
                difference = relative_difference(state, alone, first, group)
                print(f"{name}, {group}: differs by {difference:.1e} of its change")
                assert difference < tolerance, (name, group)


@pytest.mark.parametrize(
    ("variables", "train", "remedy"),
    [
        ({"FSDP_VERSION": "1"}, {}, "use its second version"),
        ({"WORLD_SIZE": "1"}, {}, "start at least two processes"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "keep weights on the devices"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "use train.gradient_checkpointing"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "every process builds the network"),
        ({}, {"precision": "fp16"}, "set train.precision to 'bf16' or 'no'"),
        ({}, {"text_encoder": True}, "set train.text_encoder to false"),
    ],
)
def test_configurations_that_are_refused(variables, train, remedy, monkeypatch):
    from tasks import params
    from tasks.training import sharded

    for name, value in ({"FSDP_VERSION": "2", "WORLD_SIZE": "2"} | variables).items():
        monkeypatch.setenv(name, value)
    section = params.load(ROOT / "params.yaml").train.model_copy(update=train)
    with pytest.raises(StageError, match=f"configuration of FSDP does not fit: {remedy}"):
        sharded.check(section, int(os.environ["WORLD_SIZE"]))


def test_modules_that_several_blocks_share_are_a_unit():
    import torch

    from models.networks.dit import DiT, DiTConfig
    from tasks.training.sharded import shared_modules

    with torch.device("meta"):
        network = DiT(DiTConfig(size=8, channels=1, patch_size=2, width=16, depth=2, heads=2, conditions=3))
    assert shared_modules(network) == [network.embedding]


@pytest.mark.slow
def test_equals_one_process_and_continues(tmp_path, monkeypatch, migrated_database):
    compare(CASES, tmp_path, monkeypatch, migrated_database)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_network_and_method(tmp_path, monkeypatch, migrated_database):
    compare(DRILLS, tmp_path, monkeypatch, migrated_database)


@pytest.mark.gpu
@pytest.mark.timeout(1200)
def test_on_two_gpus(tmp_path, monkeypatch, migrated_database):
    """In bf16, NHWC and compiled; with fewer GPUs it runs on the CPU."""
    fast = {"precision": "bf16", "channels_last": True, "compile": True}
    compare({"label": fast, "text": fast | {"conditioning": "text"}}, tmp_path, monkeypatch, migrated_database)
