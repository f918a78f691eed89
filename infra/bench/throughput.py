"""Training images per second, ours beside the reference loop: same network, same batch, same pictures.

For each network and batch size four runs stand ready, each side in float32 and in bfloat16, and take turns in short
blocks, so that whatever else the machine does meets all of them. A ratio is the median over the rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from infra.bench.contestant import Block, Contestant, Side
from infra.bench.inputs import Inputs, parameters, prepare
from infra.bench.peer import network
from tasks.params import Params

WARM_UP = 3
"""Steps before the clock: the first ones choose kernels and allocate memory."""
PRECISIONS = ("no", "bf16")
ON_CPU = ("digits:16", "digits:32", "cifar10_tiny:16", "cifar10_tiny:32", "cifar10_ddpm:16")
ON_GPU = ("cifar10_ddpm:16", "cifar10_ddpm:128", "cifar10_ddpm:256", "cifar10_ddpm:512")


@dataclass(frozen=True)
class Plan:
    """What to measure: `cases` are "preset:batch size", none of them meaning those that fit the machine."""

    work: Path
    archive: Path | None
    cases: tuple[str, ...]
    rounds: int
    block_seconds: float
    overrides: tuple[str, ...] = ()


def measure(plan: Plan) -> dict[str, Any]:
    import torch

    from models.flops import matmul_ceiling

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = plan.cases or (ON_GPU if device.type == "cuda" else ON_CPU)
    ceilings = {"no": matmul_ceiling(device, torch.float32), "bf16": matmul_ceiling(device, torch.bfloat16)}
    rows = [row for case in cases for row in _case(plan, case, ceilings)]
    return {"rows": rows, "matmul_flops": ceilings}


def _case(plan: Plan, case: str, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of one network and batch size: one per precision, and one of the defaults of both sides."""
    preset, batch = case.split(":")
    own = parameters(preset, plan.archive, *plan.overrides).train.precision
    runs: dict[tuple[Side, str], Params] = {}
    for precision in PRECISIONS:
        params = parameters(
            preset,
            plan.archive,
            "conditioning=none",
            f"train.batch_size={batch}",
            f"train.precision='{precision}'",
            "train.steps=1000000",
            *plan.overrides,
        )
        runs |= {("peer", precision): params, ("ours", precision): params}
    inputs = prepare(plan.work, params)
    blocks, size = _take_turns(plan, case, runs, inputs)
    flops = training_flops(params)

    def row(what: str, peer: str, ours: str) -> dict[str, Any]:
        theirs, mine = blocks["peer", peer], blocks["ours", ours]
        return {
            "network": preset,
            "parameters": size,
            "batch_size": int(batch),
            "compared": what,
            "peer_img_s": _rate(theirs, lambda block: block.seconds),
            "ours_img_s": _rate(mine, lambda block: block.seconds),
            "ratio": _ratio(theirs, mine, lambda block: block.seconds),
            "ratio_by_cpu_time": _ratio(theirs, mine, lambda block: block.cpu_seconds),
            "ours_utilisation": round(flops * _rate(mine, lambda block: block.seconds) / ceilings[ours], 3),
        }

    same = [
        row("both float32" if precision == "no" else f"both {precision}", precision, precision)
        for precision in PRECISIONS
    ]
    return [*same, row(f"defaults: float32, ours {'float32' if own == 'no' else own}", "no", own)]


def _take_turns(
    plan: Plan, case: str, runs: dict[tuple[Side, str], Params], inputs: Inputs
) -> tuple[dict[tuple[Side, str], list[Block]], int]:
    """Blocks of every run, of equally many steps each, and the number of parameters."""
    with ExitStack() as stack:
        ready = {
            name: stack.enter_context(Contestant(name[0], params, inputs, plan.work / "scratch"))
            for name, params in runs.items()
        }
        slowest = 0.0
        for contestant in ready.values():
            contestant.advance(WARM_UP)
            slowest = max(slowest, contestant.advance(WARM_UP).seconds / WARM_UP)
        steps = max(1, round(plan.block_seconds / slowest))
        blocks: dict[tuple[Side, str], list[Block]] = {name: [] for name in ready}
        turns = [
            name for turn in range(plan.rounds) for name in (list(ready) if turn % 2 == 0 else list(reversed(ready)))
        ]
        for name in tqdm(turns, f"throughput {case}, {steps} steps a block", unit="block", dynamic_ncols=True):
            blocks[name].append(ready[name].advance(steps))
        return blocks, next(iter(ready.values())).parameters


def _rate(blocks: list[Block], clock: Callable[[Block], float]) -> float:
    return round(median(block.images / clock(block) for block in blocks), 2)


def _ratio(theirs: list[Block], ours: list[Block], clock: Callable[[Block], float]) -> float:
    return round(median(clock(a) / clock(b) for a, b in zip(theirs, ours, strict=True)), 3)


def training_flops(params: Params) -> float:
    """Floating-point operations of forward and backward for one image, counted on tensors without content."""
    import torch

    from models.flops import forward_flops
    from models.unet import UNet

    with torch.device("meta"):
        image = torch.empty(1, params.image.channels, params.image.size, params.image.size)
        return 3 * forward_flops(UNet(network(params)), image, torch.zeros(1, dtype=torch.int64))
