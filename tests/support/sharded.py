"""`python -m tests.support.sharded PORT`: three steps of Muon on a network that FSDP2 shards among two CPU processes.

Prints the largest difference between its weights and those of one process, and the share of the weights that a process
holds.
"""

from __future__ import annotations

import copy
import os
import sys

import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from models.networks.unet import UNet, UNetConfig
from models.optimization.muon import MuonWithAdamW

PROCESSES, BATCH, STEPS = 2, 4, 3


def _train(network: nn.Module, rows: slice) -> None:
    optimizer = MuonWithAdamW(network, lr=0.02, adamw_lr=0.004, momentum=0.95, weight_decay=0.01)
    for seed in range(STEPS):
        generator = torch.Generator().manual_seed(seed)
        x, t = torch.randn(BATCH, 1, 8, 8, generator=generator), 1000 * torch.rand(BATCH, generator=generator)
        network(x[rows], t[rows], torch.arange(BATCH)[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _process(rank: int, port: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    whole = UNet(UNetConfig(8, 1, (8, 16), (False, True), 1, 4, 8, conditions=4))
    for parameter in whole.parameters():
        if not parameter.count_nonzero():
            nn.init.normal_(parameter, std=0.1)
    sharded = copy.deepcopy(whole)
    _train(whole, slice(None))
    fully_shard(sharded, mesh=init_device_mesh("cpu", (PROCESSES,)))
    share = BATCH // PROCESSES
    _train(sharded, slice(rank * share, (rank + 1) * share))
    pairs = zip(whole.parameters(), sharded.parameters(), strict=True)
    difference = max((own - other.full_tensor()).abs().max().item() for own, other in pairs)
    held = sum(parameter.to_local().numel() for parameter in sharded.parameters())
    if rank == 0:
        print(difference, held / sum(parameter.numel() for parameter in whole.parameters()))
    dist.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.spawn(_process, (sys.argv[1],), PROCESSES)
