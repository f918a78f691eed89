"""Training images per second of ours and of the reference loop: same network, same batch, same images.

For each network and batch size there are four runs, each side in float32 and in bfloat16. They alternate in short
blocks, so that other load of the machine affects all of them. A ratio is the median over the rounds. The case
"default" compares the reference with its default batch size in float32 with our preset as it is.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, TypeAlias, TypedDict

import torch

from infra.bench.cases import AS_THEY_COME, THROUGHPUT_ON_CPU, THROUGHPUT_ON_GPU
from infra.bench.clock import Block, take_turns
from infra.bench.contestant import Contestant, Side
from infra.bench.inputs import Inputs, parameters, prepare
from infra.bench.peer import DEFAULT_BATCH, network
from infra.bench.results import Piecewise
from models.flops import forward_flops, matmul_ceiling
from models.networks.unet import UNet

if TYPE_CHECKING:
    from infra.bench.schema import Throughput, ThroughputRow
    from tasks.params import Params

PRECISIONS = ("no", "bf16")

Runs: TypeAlias = "dict[tuple[Side, str], Params]"


@dataclass(frozen=True)
class Plan:
    """`cases` are "preset:batch size" or "preset:default"; none means the list for the CPU or for the GPU."""

    work: Path
    archive: Path | None
    cases: tuple[str, ...]
    rounds: int
    block_seconds: float
    overrides: tuple[str, ...] = ()


def measure(plan: Plan) -> Throughput:
    """Measure every case."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = plan.cases or (THROUGHPUT_ON_GPU if device.type == "cuda" else THROUGHPUT_ON_CPU)
    ceilings = {"no": matmul_ceiling(device, torch.float32), "bf16": matmul_ceiling(device, torch.bfloat16)}
    with Piecewise(plan.work / "pieces") as kept:
        arguments = {**plan.__dict__, "cases": None}
        pieces = [kept.piece([arguments, case], partial(_case, plan, case, ceilings)) for case in cases]
    rows = [row for piece in pieces for row in piece]
    return {"rows": rows, "matmul_flops": ceilings}


def _case(plan: Plan, case: str, ceilings: dict[str, float]) -> list[ThroughputRow]:
    """Rows of one case.

    With a batch size: one for each precision, and one with each side's own precision. With the defaults: one.
    """
    preset, batch = case.split(":")
    common = ["conditioning=none", "train.steps=1000000", *plan.overrides]
    preferred = parameters(preset, plan.archive, *common)
    if not torch.cuda.is_available() and preferred.train.precision != "no":
        common.insert(0, "train.channels_last=false")  # in bfloat16 this memory format is slow on a CPU
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


class Rates(TypedDict):
    """The part of a `ThroughputRow` that is measured."""

    peer_img_s: float
    ours_img_s: float
    ratio: float
    ratio_by_cpu_time: float


def _rates(theirs: list[Block], ours: list[Block]) -> Rates:
    """Medians over the rounds: images per second of both sides, and the ratio by time and by CPU time."""
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
    """Floating-point operations of forward and backward for one image, counted on meta tensors."""
    with torch.device("meta"):
        image = torch.empty(1, params.image.channels, params.image.resolution, params.image.resolution)
        return 3 * forward_flops(UNet(network(params)), image, torch.zeros(1, dtype=torch.int64))
