"""Runs the parts one after the other, each in a process of its own that is ended when its time is over.

A part that crashes, runs out of memory or hangs therefore costs only its own rows. What has been measured is written
after every row, so that a run that is killed keeps it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from infra.bench.gpu import table
from infra.bench.gpu.goals import goals_of
from infra.bench.gpu.plan import NEEDS, PARTS, Plan, Row, Setting
from tasks.runtime.errors import StageError
from tasks.runtime.parent import end_with_parent

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

GRACE = 30.0
"""Seconds after its limit at which a part is ended: what it measures then may still come to its end."""
START_SECONDS = 120.0
"""Most seconds until a part has imported what it needs; its limit counts from then."""
READY = None
"""First message of a part."""
PRELOADED = ["torch", "diffusers.models.autoencoders.autoencoder_kl", "infra.bench.gpu.reference"]


def run(plan: Plan, reports: Path) -> list[Row]:
    """Run the parts of the plan and write the reports.

    Raises:
        StageError: on a machine without a GPU, unless the plan is for the CPU.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler writes a line when it starts and stops
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise StageError("this machine has no GPU that PyTorch can use; --device cpu runs a tiny form of every part")
    device, rows = table.describe(plan.device), list[Row]()
    plan.work.mkdir(parents=True, exist_ok=True)
    if plan.tiny:
        print("bench: tiny form on a CPU; its numbers are meaningless", flush=True)
    for row in _rows(plan):
        print(table.line_of(row), flush=True)
        rows.append(row)
        table.write(reports, plan, device, rows, goals_of(rows, device.name))
    print(table.markdown(plan, device, rows, goals_of(rows, device.name)), flush=True)
    return rows


def _rows(plan: Plan) -> Iterator[Row]:
    end = time.monotonic() + 60 * plan.minutes
    for part in PARTS:
        missing = [name for name in NEEDS.get(part, ()) if importlib.util.find_spec(name) is None]
        if option := plan.excluded(part):
            yield Row(part, "all", skipped=f"left out by {option}")
        elif missing:
            yield Row(part, "all", skipped=f"package {missing[0]} is not installed")
        else:
            yield from _part(plan, part, plan.seconds_of(part, end - time.monotonic()))


def _part(plan: Plan, part: str, seconds: float) -> Iterator[Row]:
    """Yield the rows of one part as its process sends them; the process is gone afterwards."""
    # The fork server has no threads and no GPU context, so forking it is safe, and its imports are shared.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, part, plan, seconds))
    process.start()
    sender.close()
    try:
        limit, end = START_SECONDS, 0.0  # until its first message, when everything is imported
        while receiver.poll(limit):
            if (row := receiver.recv()) is not READY:
                yield row
            else:
                end = time.monotonic() + seconds + GRACE
            limit = max(0.0, end - time.monotonic())
        yield Row(part, "the rest", failed=f"ended after {seconds + GRACE:.0f} s; raise --seconds or --minutes")
    except EOFError:
        process.join(GRACE)
        if process.exitcode:
            yield Row(part, "the rest", failed=f"its process ended with exit code {process.exitcode}, see above")
    finally:
        process.kill()
        _end_group(process.pid)
        process.join()


def _end_group(leader: int | None) -> None:
    """Kill what a part has started, such as the compiler's workers."""
    if leader is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)


def _serve(sender: Connection[Row | None, object], part: str, plan: Plan, seconds: float) -> None:
    """The process: measure one part and send its rows."""
    os.setsid()
    end_with_parent()
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as in models/bundle.py
    if plan.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(1)
    try:
        measure = importlib.import_module(f"infra.bench.gpu.{part}").measure
        sender.send(READY)
        measure(Setting(plan.device, plan.tiny, plan.work, time.monotonic() + seconds), sender.send)
    except BrokenPipeError:  # the command was ended
        return
    finally:
        sender.close()
