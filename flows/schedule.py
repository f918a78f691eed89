"""Which stages run, and when: each after those that it depends on, several at the same time if they are independent.

DVC allows this: `dvc repro --single-item` holds the lock of the repository only while it reads and writes its own
files. While the command of a stage runs, only the files of this stage are locked.
"""

from __future__ import annotations

import contextvars
import graphlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

JOBS = 1
"""Stages at the same time, by default."""


def run(
    graph: Mapping[str, Sequence[str]],
    work: Callable[[str], bool],
    *,
    jobs: int = 1,
    alone: Collection[str] = (),
    interrupt: Callable[[], None] = lambda: None,
) -> None:
    """Call `work` for every stage, up to the first that fails; calls that run at that time are waited for.

    A stage beside which no other runs is worked on in the calling thread, where a signal interrupts it.

    Args:
        graph: Stage -> the stages that it depends on; the order decides between stages that can start.
        work: Brings one stage up to date; returns whether it succeeded. It has the context variables of the caller.
        jobs: Calls at the same time, at most.
        alone: Stages beside which no other runs.
        interrupt: Ends the calls in other threads after an exception, such as Ctrl-C.
    """
    order = graphlib.TopologicalSorter(graph)
    order.prepare()
    position = {stage: number for number, stage in enumerate(graph)}
    ready, failed = sorted(order.get_ready(), key=position.__getitem__), False
    running: dict[Future[bool], str] = {}
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        try:
            while running or (ready and not failed):
                if not running and (jobs <= 1 or len(ready) == 1 or ready[0] in alone):
                    stage = ready.pop(0)
                    results = {stage: work(stage)}
                else:
                    able = [] if failed else [stage for stage in ready if stage not in alone]
                    for stage in able[: jobs - len(running)]:
                        ready.remove(stage)
                        running[pool.submit(contextvars.copy_context().run, work, stage)] = stage
                    ended, _ = wait(running, return_when=FIRST_COMPLETED)
                    results = {running.pop(future): future.result() for future in ended}
                order.done(*(stage for stage, good in results.items() if good))
                failed = failed or not all(results.values())
                ready = sorted([*ready, *order.get_ready()], key=position.__getitem__)
        except BaseException:  # also KeyboardInterrupt and the exceptions by which Prefect cancels a flow
            interrupt()
            raise
