"""Training images per second, ours beside the reference loop: same network, same batch, same pictures.

For each network and batch size four runs stand ready, each side in float32 and in bfloat16, and take turns in short
blocks, so that whatever else the machine does meets all of them. A ratio is the median over the rounds. "As they come"
is the reference with its default batch size in float32 against our preset.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from infra.bench.contestant import Block, Contestant, Side, take_turns
from infra.bench.inputs import Inputs, parameters, prepare
from infra.bench.peer import DEFAULT_BATCH, network
from infra.bench.results import Piecewise
from tasks.params import Params

PRECISIONS = ("no", "bf16")
AS_THEY_COME = "default"
ON_CPU = ("digits:32", "cifar10_tiny:16", "cifar10_tiny:64", "cifar10_tiny:default", "cifar10_ddpm:16")
ON_GPU = ("cifar10_ddpm:128", "cifar10_ddpm:256", "cifar10_ddpm:512", "cifar10_ddpm:default")

Runs: TypeAlias = "dict[tuple[Side, str], Params]"


@dataclass(frozen=True)
class Plan:
    """What to measure: `cases` are "preset:batch size" or "preset:default"; none means those that fit the machine."""

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
    with Piecewise(plan.work / "pieces") as kept:
        told = {**plan.__dict__, "cases": None}
        pieces = [kept.piece([told, case], partial(_case, plan, case, ceilings)) for case in cases]
    rows = [row for piece in pieces for row in piece]
    return {"rows": rows, "matmul_flops": ceilings}


def _case(plan: Plan, case: str, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of one network: with a batch size, one of each precision and one of the defaults; else both as they come."""
    import torch

    preset, batch = case.split(":")
    common = ["conditioning=none", "train.steps=1000000", *plan.overrides]
    if not torch.cuda.is_available():
        common.insert(0, "train.channels_last=false")  # a layout for GPUs, which a preset for them has
    preferred = parameters(preset, plan.archive, *common)
    own: str = preferred.train.precision
    if batch == AS_THEY_COME:
        theirs = [f"train.batch_size={DEFAULT_BATCH}", "train.precision='no'"]
        runs: Runs = {("peer", "no"): parameters(preset, plan.archive, *common, *theirs), ("ours", own): preferred}
        compared = [(f"as they come: batch {DEFAULT_BATCH}, ours {preferred.train.batch_size}", "no", own)]
    else:
        runs = {}
        for precision in PRECISIONS:
            chosen = [f"train.batch_size={batch}", f"train.precision='{precision}'"]
            same = parameters(preset, plan.archive, *common, *chosen)
            runs |= {("peer", precision): same, ("ours", precision): same}
        compared = [(f"batch {batch}", precision, precision) for precision in PRECISIONS]
        compared += [(f"batch {batch}", "no", own)] if own != "no" else []
    blocks, size = _measured(plan, case, runs, prepare(plan.work, preferred))
    flops = training_flops(preferred)
    return [
        {
            "network": preset,
            "parameters": size,
            "compared": what,
            "peer_precision": theirs,
            "ours_precision": mine,
            **_rates(blocks["peer", theirs], blocks["ours", mine]),
            "ours_utilisation": round(flops * _rate(blocks["ours", mine]) / ceilings[mine], 3),
        }
        for what, theirs, mine in compared
    ]


def _measured(plan: Plan, case: str, runs: Runs, inputs: Inputs) -> tuple[dict[tuple[Side, str], list[Block]], int]:
    """Blocks of every run, each as long as `block_seconds` or a step, and the number of parameters."""
    with ExitStack() as stack:
        ready = {
            name: stack.enter_context(Contestant(name[0], params, inputs, plan.work / "scratch"))
            for name, params in runs.items()
        }
        turns = {name: contestant.turn for name, contestant in ready.items()}
        blocks = take_turns(turns, plan.rounds, plan.block_seconds, f"throughput {case}")
        return blocks, next(iter(ready.values())).parameters


def _rates(theirs: list[Block], ours: list[Block]) -> dict[str, float]:
    """Medians over the rounds: images per second of both, how many times more ours makes, and that by CPU time."""
    pairs = list(zip(theirs, ours, strict=True))
    by_cpu = [(b.images / b.cpu_seconds) / (a.images / a.cpu_seconds) for a, b in pairs]
    return {
        "peer_img_s": round(_rate(theirs), 2),
        "ours_img_s": round(_rate(ours), 2),
        "ratio": round(median((b.images / b.seconds) / (a.images / a.seconds) for a, b in pairs), 3),
        "ratio_by_cpu_time": round(median(by_cpu), 3),
    }


def _rate(blocks: list[Block]) -> float:
    return median(block.images / block.seconds for block in blocks)


def training_flops(params: Params) -> float:
    """Floating-point operations of forward and backward for one image, counted on tensors without content."""
    import torch

    from models.flops import forward_flops
    from models.networks.unet import UNet

    with torch.device("meta"):
        image = torch.empty(1, params.image.channels, params.image.size, params.image.size)
        return 3 * forward_flops(UNet(network(params)), image, torch.zeros(1, dtype=torch.int64))
