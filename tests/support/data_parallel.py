"""`python -m tests.support.data_parallel PORT FOLDER`: train what a folder holds in two CPU processes, unsharded (DDP).

Each process writes `rank-<n>.json` to the folder: how often its host waited in a call of `fit` with one step and with
three, whether its module keeps gradients as views of the buckets, its weights' sum after the same steps, and of the
first process whether the second had gone on while its checkpoint was held back.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from tests.support.waits import Waits

PROCESSES = 2
HELD_STEP, FURTHER_STEPS = 3, 2
"""Step of the checkpoint that is held back, and the steps after it that the other process has to do meanwhile."""
SECONDS = 60.0


class Silent:
    """A run in MLflow that stores nothing: with it `fit` saves checkpoints, as in the first process of a training."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        pass

    def image(self, name: str, step: int, picture: Path) -> None:
        pass


def _hold_back(patch: pytest.MonkeyPatch, advanced: Path) -> list[bool]:
    """Let the writer of checkpoints wait for the file `advanced`; returns a list that gets whether it appeared."""
    from tasks.training import checkpoint

    save, appeared = checkpoint.save, list[bool]()

    def held(folder: Path, state: checkpoint.Checkpoint) -> None:
        end = time.monotonic() + SECONDS
        while state.step == HELD_STEP and not advanced.exists() and time.monotonic() < end:
            time.sleep(0.01)
        if state.step == HELD_STEP:
            appeared.append(advanced.exists())
        save(folder, state)

    patch.setattr(checkpoint, "save", held)
    return appeared


def _announce(run, advanced: Path) -> None:
    """Write the file `advanced` when the run has done `FURTHER_STEPS` steps after the checkpoint."""
    draw = run.batches.draw

    def announcing(step: int, part: int = 0):
        if step == HELD_STEP + FURTHER_STEPS:
            advanced.touch()
        return draw(step, part)

    run.batches.draw = announcing


def _process(rank: int, port: str, folder: Path) -> None:
    from tasks import train
    from tasks.training import stopping
    from tests.support.train_inputs import prepare_here

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "OMP_NUM_THREADS": "1"}
    os.environ |= {"LOCAL_WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    with pytest.MonkeyPatch.context() as patch:
        appeared = _hold_back(patch, folder / "advanced")
        run = prepare_here(folder, patch, folder / "mlflow.db")
        assert isinstance(run.module, DistributedDataParallel) and not run.sharded
        if rank == 1:
            _announce(run, folder / "advanced")
        train.fit(run, Silent() if rank == 0 else None, [], until=HELD_STEP + FURTHER_STEPS + 1)
        patch.setattr(stopping, "ASK_SECONDS", 1e9)  # signals are exchanged once per call, through the hosts
        run.params = run.params.model_copy(update={"checkpoint_every": 100})  # a checkpoint is read from the device
        waits = Waits()
        few = waits.during(lambda: train.fit(run, None, [], until=run.step + 1))
        found = {
            "waits": [few, waits.during(lambda: train.fit(run, None, [], until=run.step + 3))],
            "views": run.module.gradient_as_bucket_view,
            "weights": sum(weights.double().sum().item() for weights in run.network.parameters()),
            "advanced": appeared,
        }
        (folder / f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.spawn(_process, (sys.argv[1], Path(sys.argv[2])), PROCESSES)
