"""`python -m tests.support.sharded_training PORT STEPS FOLDER...`: train what each folder holds, sharded by FSDP2.

Two processes, on two GPUs or on the CPU, train each folder for STEPS steps, and once more from the checkpoint of half
of them. The first process writes to each folder `whole.safetensors` and `continued.safetensors`, the state after both
by `<group>|<name>`, and `counts.json`: the share of the weights that it holds, and how often the host waited in a call
of `fit` with one step and with three.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import multiprocessing

from tests.support.waits import Waits

PROCESSES = 2
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


def flat(tensors: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return groups of tensors as one group."""
    return {f"{group}|{name}": value for group, named in tensors.items() for name, value in named.items()}


def start_nowhere_at_zero(patch: pytest.MonkeyPatch) -> None:
    """Draw the weights that start at zero: behind them, most gradients of a frozen or an untrained network are zero."""
    patch.setattr(torch.nn.init, "zeros_", lambda tensor: torch.nn.init.normal_(tensor, std=0.05))


def compile_eagerly(patch: pytest.MonkeyPatch) -> None:
    """Without a GPU, let a compiled network run operator by operator: code for a CPU takes minutes to compile."""
    from models.networks import compilation

    if not torch.cuda.is_available():
        patch.setattr(compilation, "compiled", partial(compilation.compiled, backend="eager"))


def _trained(folder: Path, patch: pytest.MonkeyPatch, start: int, until: int):
    """Build the run of a folder, which must continue at step `start`, and train it up to step `until`."""
    from tasks import train
    from tasks.training.run import gather_tallies, snapshot
    from tests.support.train_inputs import prepare_here

    run = prepare_here(folder, patch, folder / "mlflow.db")
    assert run.sharded and run.step == start
    train.fit(run, None, [], until=until)
    return run, snapshot(run, gather_tallies(run))


def _waits(folder: Path, patch: pytest.MonkeyPatch, start: int) -> list[int]:
    """Count the waits of the host in a call of `fit` with one step, and in one with three."""
    from tasks import train
    from tasks.training import stopping

    patch.setattr(stopping, "ASK_SECONDS", 1e9)  # signals are exchanged once per call, through the hosts
    run, _ = _trained(folder, patch, start // 2, start // 2)
    waits = Waits()
    few = waits.during(lambda: train.fit(run, None, [], until=run.step + 1))
    return [few, waits.during(lambda: train.fit(run, None, [], until=run.step + 3))]


def _process(rank: int, port: str, steps: int, folders: list[Path]) -> None:
    from tasks.training import checkpoint

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    distributed = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= distributed | FSDP | {"LOCAL_WORLD_SIZE": str(PROCESSES), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        start_nowhere_at_zero(patch)
        compile_eagerly(patch)
        for folder in folders:
            run, whole = _trained(folder, patch, 0, steps)
            held = sum(parameter.to_local().numel() for parameter in run.network.parameters())
            share = held / sum(parameter.numel() for parameter in run.network.parameters())
            run, half = _trained(folder, patch, 0, steps // 2)
            if rank == 0:
                checkpoint.save(run.folder, half)
            torch.distributed.barrier()
            _, continued = _trained(folder, patch, steps // 2, steps)
            waits = _waits(folder, patch, steps)
            if rank == 0:
                save_file(flat(whole.tensors), folder / "whole.safetensors")
                save_file(flat(continued.tensors), folder / "continued.safetensors")
                (folder / "counts.json").write_text(json.dumps({"share": share, "waits": waits}))
            torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.spawn(_process, (sys.argv[1], int(sys.argv[2]), [*map(Path, sys.argv[3:])]), PROCESSES)
