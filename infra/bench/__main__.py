"""The command line `python -m infra.bench PART`. Every part can be run alone; its result is stored in `bench.json`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from infra.bench import cases
from infra.bench.gpu import plan as gpu_plan
from tasks.params import ParamsError
from tasks.params.composition import PresetError
from tasks.params.redaction import redacted
from tasks.runtime import loopback
from tasks.runtime.errors import StageError
from tasks.runtime.stage import PREEMPTED, limit_openmp_spin

if TYPE_CHECKING:
    from infra.bench.results import Results

DIGITS, CIFAR = "digits", "cifar10_tiny"
NO_CIFAR = "there is no CIFAR-10 without --cifar; give a zip of JPEGs in class folders"
SAMPLERS = ("ddim", "dpm_solver_pp_2m", "euler")
_FEW = "--samples 64 --sampler-steps 2 --set train.warmup_steps=1 train.steps=20"
REHEARSAL = {
    "startup": "--repeats 1",
    "throughput": "--rounds 1 --block-seconds 0.01 --cases digits:4 cifar10_tiny:4 cifar10_ddpm:2",
    "encoding": "--rounds 1 --block-seconds 0.01",
    "quality": f"--steps 6 --minutes 0.1 --seeds 1 --points 1 --own-points 2 {_FEW}",
    "sampling": "--samples 4 --set train.warmup_steps=1 train.steps=20",
    "levers": f"--steps 20 --minutes 0.05 --seeds 1 --only diffusion.loss_weighting=plain {_FEW}",
}
"""Arguments that run every part within minutes; the numbers are meaningless."""


def main() -> None:
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))  # also ends the processes that were started
    limit_openmp_spin()
    from infra.bench.results import Results  # which imports torch

    loopback.exempt(os.environ)
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "False")
    try:
        arguments.run(arguments, Results(arguments.reports, arguments.again))
    except (StageError, ParamsError, PresetError) as error:
        sys.exit(f"bench: error: {redacted(str(error))}")
    except KeyboardInterrupt:
        sys.exit("\nbench: interrupted; the same command continues with the parts that are not measured yet")
    written = {_gpu: "bench_gpu", _scale: "bench_scale"}.get(arguments.run, "bench")
    print(f"bench: {arguments.reports / f'{written}.md'}, {arguments.reports / f'{written}.json'}")


def _measure(
    results: Results, name: str, arguments: Mapping[str, object], measure: Callable[[], Mapping[str, object]]
) -> None:
    from infra.bench import report

    report.write(results.folder, results.part(name, arguments, measure))


def _throughput(given: argparse.Namespace, results: Results) -> None:
    from infra.bench import throughput

    plan = throughput.Plan(
        given.work, given.cifar, tuple(given.cases), given.rounds, given.block_seconds, tuple(given.set)
    )
    _measure(results, "throughput", plan.__dict__, lambda: throughput.measure(plan))


def _quality(given: argparse.Namespace, results: Results) -> None:
    from infra.bench import quality

    digits = given.data == DIGITS
    samplers = tuple(given.samplers or (SAMPLERS if digits else ("ddim", "euler")))
    plan = quality.Plan(
        work=given.work,
        preset=DIGITS if digits else CIFAR,
        archive=None if digits else given.cifar,
        seeds=given.seeds or (3 if digits else 1),
        steps=given.steps,
        minutes=None if digits else given.minutes,
        share=given.share,
        points=given.points or (5 if digits else 4),
        own_points=given.own_points or (20 if digits else 6),
        measure=quality.Measure(given.samples, given.sampler_steps, samplers),
        overrides=(*(["conditioning=none"] if given.unconditional else []), *given.set),
    )
    if not digits and given.cifar is None:
        raise StageError(NO_CIFAR)
    name = f"quality_{given.data}{'_unconditional' if given.unconditional else ''}"
    _measure(results, name, {**plan.__dict__, "measure": plan.measure.__dict__}, lambda: quality.measure(plan))


def _levers(given: argparse.Namespace, results: Results) -> None:
    from infra.bench import levers, quality

    digits = given.data == DIGITS
    if not digits and given.cifar is None:
        raise StageError(NO_CIFAR)
    how = quality.Measure(given.samples, given.sampler_steps, tuple(given.samplers or SAMPLERS))
    plan = levers.Plan(
        work=given.work,
        pictures=results.folder / "bench",
        preset=DIGITS if digits else CIFAR,
        archive=None if digits else given.cifar,
        steps=given.steps,
        minutes=None if digits else given.minutes,
        seeds=given.seeds or (2 if digits else 1),
        measure=how,
        only=tuple(given.only),
        overrides=tuple(given.set),
    )
    _measure(results, plan.name, {**plan.__dict__, "measure": how.__dict__}, lambda: levers.measure(plan))


def _sampling(given: argparse.Namespace, results: Results) -> None:
    from infra.bench import sampling

    plan = sampling.Plan(given.work, given.pipeline, given.samples, tuple(given.set))
    _measure(results, "sampling", plan.__dict__, lambda: sampling.measure(plan))


def _encoding(given: argparse.Namespace, results: Results) -> None:
    from infra.bench import encoding

    plan = encoding.Plan(
        given.work, given.photos, tuple(given.cases), given.rounds, given.block_seconds, tuple(given.set)
    )
    _measure(results, "encoding", plan.__dict__, lambda: encoding.measure(plan))


def _startup(given: argparse.Namespace, results: Results) -> None:
    from infra.bench import startup

    plan = startup.Plan(given.work, given.repeats, tuple(given.set))
    _measure(results, "startup", plan.__dict__, lambda: startup.measure(plan))


def _gpu(given: argparse.Namespace, results: Results) -> None:
    from infra.bench.gpu import runner

    plan = gpu_plan.Plan(
        given.work / "gpu", given.device, given.minutes, given.seconds, tuple(given.only), tuple(given.skip)
    )
    runner.run(plan, results.folder)


def _scale(given: argparse.Namespace, results: Results) -> None:
    from infra.bench.scale import runner

    only = tuple(name for name in runner.STAGES if not given.only or name in given.only)
    runner.run(runner.Plan(given.work, given.rows, given.ingest_rows, only), results.folder)


def _all(given: argparse.Namespace, results: Results) -> None:
    """Run every part with its defaults, the short ones first; a rehearsal writes no reports."""
    from infra.bench.results import Results

    if given.rehearse:
        given.reports = given.work / "rehearsal"
        results = Results(given.reports, again=True)
    shared = ["--work", str(given.work), "--reports", str(given.reports), *(["--again"] if given.again else [])]
    archive = ["--cifar", str(given.cifar)] if given.cifar else []
    parts = [
        ["startup"],
        ["throughput", *archive],
        ["encoding"],
        ["quality"],
        ["quality", "--unconditional"],
        ["sampling"],
        ["levers"],
    ]
    parts += [[part, "--data", "cifar", *archive] for part in ("quality", "levers")] if archive else []
    for number, part in enumerate(parts, 1):
        part = [*part, *(REHEARSAL[part[0]].split() if given.rehearse else [])]
        print(f"bench: part {number} of {len(parts)}: {' '.join(part)}", flush=True)
        chosen = _parser().parse_args([*shared, *part])
        chosen.run(chosen, results)
    if not archive:
        print("bench: no --cifar, so quality and levers on CIFAR-10 were left out")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m infra.bench", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".scratch/bench"), help="folder of inputs and finished runs")
    parser.add_argument(
        "--reports", type=Path, default=Path("reports"), help="folder of bench.json, bench.md and bench/"
    )
    parser.add_argument("--again", action="store_true", help="repeat the measurement of a part that is in bench.json")
    parts = parser.add_subparsers(required=True, metavar="PART")

    def part(name: str, run: object, what: str, with_overrides: bool = True) -> argparse.ArgumentParser:
        chosen = parts.add_parser(
            name, help=what, description=what, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        chosen.set_defaults(run=run)
        if with_overrides:
            chosen.add_argument(
                "--set", nargs="*", default=[], metavar="key=value", help="parameters that differ from the preset"
            )
        return chosen

    def archive(chosen: argparse.ArgumentParser) -> None:
        chosen.add_argument("--cifar", type=Path, metavar="ZIP", help="CIFAR-10 as JPEGs in class folders")

    def measured(chosen: argparse.ArgumentParser) -> None:
        chosen.add_argument("--samples", type=int, default=512, help="images of one distance")
        chosen.add_argument("--sampler-steps", type=int, default=20, help="network evaluations of one image")
        chosen.add_argument(
            "--samplers", nargs="+", metavar="NAME", help="samplers; the one with the smallest distance counts"
        )

    chosen = part("all", _all, "every part with its defaults", with_overrides=False)
    archive(chosen)
    chosen.add_argument("--rehearse", action="store_true", help="run through every part without measuring anything")

    chosen = part("gpu", _gpu, "what this GPU does in ten minutes; needs few packages", with_overrides=False)
    chosen.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a tiny form of every part")
    chosen.add_argument("--minutes", type=float, default=10.0, help="limit of all parts together")
    chosen.add_argument("--seconds", type=float, help="limit of each part; default: a share of --minutes")
    chosen.add_argument("--only", nargs="+", default=[], choices=gpu_plan.PARTS, metavar="NAME", help="parts that run")
    chosen.add_argument(
        "--skip", nargs="+", default=[], choices=gpu_plan.PARTS, metavar="NAME", help=", ".join(gpu_plan.PARTS)
    )

    chosen = part("scale", _scale, "memory and rate of the data's stages on simulated rows", with_overrides=False)
    chosen.add_argument("--rows", type=int, default=1_000_000, help="rows of all stages but ingest")
    chosen.add_argument("--ingest-rows", type=int, default=100_000, help="rows that ingest decodes")
    chosen.add_argument(
        "--only", nargs="+", default=[], metavar="STAGE", help="ingest write validate encode batches pixels hash"
    )

    def turns(chosen: argparse.ArgumentParser) -> None:
        chosen.add_argument("--rounds", type=int, default=7, help="turns of each side")
        chosen.add_argument("--block-seconds", type=float, default=3.0, help="length of a turn")

    chosen = part("throughput", _throughput, "training images per second, compared with the reference loop")
    archive(chosen)
    chosen.add_argument("--cases", nargs="*", default=[], metavar="PRESET:BATCH", help="or PRESET:default")
    turns(chosen)

    chosen = part("encoding", _encoding, "a training step on stored latents, compared with one that encodes")
    chosen.add_argument("--photos", type=Path, metavar="ZIP", help="captioned images, such as Flickr8k")
    chosen.add_argument("--cases", nargs="*", default=[], choices=list(cases.ENCODING), help="default: all")
    turns(chosen)

    chosen = part("quality", _quality, "training time until the final distance of the reference loop")
    archive(chosen)
    chosen.add_argument("--data", choices=[DIGITS, "cifar"], default=DIGITS, help="which data set")
    chosen.add_argument("--unconditional", action="store_true", help="ours without labels, which the reference lacks")
    chosen.add_argument("--seeds", type=int, help="default: 3 for digits, 1 for cifar")
    chosen.add_argument("--steps", type=int, default=500, help="steps of the reference on digits")
    chosen.add_argument("--minutes", type=float, default=20, help="minutes of the reference on cifar")
    chosen.add_argument("--share", type=float, default=0.5, help="share of them that our schedule is planned for")
    chosen.add_argument("--points", type=int, help="measurements of the reference")
    chosen.add_argument("--own-points", type=int, help="measurements of ours, if it trains to the end")
    measured(chosen)

    chosen = part("levers", _levers, "ablations of a recipe, one choice at a time")
    archive(chosen)
    chosen.add_argument("--data", choices=[DIGITS, "cifar"], default=DIGITS, help="which data set")
    chosen.add_argument("--steps", type=int, default=250, help="training steps of each on digits")
    chosen.add_argument("--minutes", type=float, default=10, help="minutes of training of each on cifar")
    chosen.add_argument("--seeds", type=int, help="runs of each; default: 2 for digits, 1 for cifar")
    chosen.add_argument("--only", nargs="*", default=[], metavar="CHANGE", help="these changes instead of the list")
    measured(chosen)

    chosen = part("sampling", _sampling, "images per second and distance of each sampler")
    chosen.add_argument("--pipeline", type=Path, help="a trained digits pipeline; without one the preset is trained")
    chosen.add_argument("--samples", type=int, default=512, help="images of one distance")

    chosen = part("startup", _startup, "seconds to the help and to the first optimizer step")
    chosen.add_argument("--repeats", type=int, default=5, help="starts of each")
    return parser


if __name__ == "__main__":
    main()
