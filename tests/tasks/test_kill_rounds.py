"""kill -9 of single stages at random moments; the same command then ends in the bytes of an undisturbed run.

The rounds go through the stages in random order, again and again. In each, a stage is made undone, started by DVC,
killed and started again. Most moments are a random part of the stage's processor time, the others follow its first
writing. `AFTERIMAGE_DRILL_ROUNDS` and `AFTERIMAGE_DRILL_SEED` are set by `make drills ROUNDS=1000 SEED=1`.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.support.stage_drill import POLL_SECONDS, STAGES, Drill, Repro, wait_until

ROUNDS = int(os.environ.get("AFTERIMAGE_DRILL_ROUNDS") or 100)
SEED = int(os.environ.get("AFTERIMAGE_DRILL_SEED") or 0)
VICTIMS = ("all", "all", "all", "stage", "dvc")
"""Whom a kill hits: all processes, the stage alone, or DVC alone, whose stage the kernel then ends."""
COLD = 0.1
FIRST_WRITING = 0.3
"""Parts of the rounds."""
LONGEST_WRITE = 0.3
"""Seconds from the first writing to the kill, at most."""
ROUND_SECONDS = 300
REPAIRED = "repaired"
WRITTEN = ("nothing", "a part", "everything", "recorded", REPAIRED)
"""What a stage had written; `repaired`: DVC's own files were cut off, and `flows.recover` mended them."""


@dataclass(frozen=True)
class Round:
    """One kill, drawn at random."""

    stage: str
    victim: str
    part: float | None
    """Processor time until the kill as a part of that of the whole stage; None for a kill at the first writing."""
    delay: float
    """Seconds between the first writing and the kill."""
    cold: bool
    """Whether DVC is started from the command line, with its stage, and not as a fork that has the packages."""

    def __str__(self) -> str:
        moment = f"{self.delay:.2f} s after the first writing" if self.part is None else f"at {self.part:.2f}"
        started = " (from the command line)" if self.cold else ""
        return f"{self.stage}{started}, kill -9 of {self.victim} {moment}"


@dataclass
class Outcomes:
    """What became of the rounds."""

    table: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Stage and what it had written -> rounds."""
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        head = f"{'stage':12}" + "".join(f"{name:>12}" for name in WRITTEN)
        rows = (f"{stage:12}" + "".join(f"{self.table[stage, name]:12}" for name in WRITTEN) for stage in STAGES)
        return "\n".join([head, *rows, f"{self.table.total()} rounds, {len(self.faults)} faults", *self.faults])


def rounds(number: int, seed: int) -> Iterator[Round]:
    """Yield `number` rounds, with every stage once in each `len(STAGES)` of them."""
    chance = random.Random(seed)
    order: list[str] = []
    for _ in range(number):
        order = order or chance.sample(STAGES, len(STAGES))
        part, cold = chance.uniform(0.0, 1.05), chance.random() < COLD
        yield Round(
            order.pop(),
            chance.choice(VICTIMS),
            None if cold or chance.random() < FIRST_WRITING else part,
            chance.uniform(0.0, LONGEST_WRITE),
            cold,
        )


@pytest.mark.slow
@pytest.mark.timeout(1800 + ROUNDS * ROUND_SECONDS)
def test_killed_stages_end_in_the_same_bytes(tmp_path, migrated_database, capsys):
    drill = Drill.make(tmp_path, migrated_database)
    outcomes = Outcomes()
    for number, each in enumerate(rounds(ROUNDS, SEED), 1):
        written, faults = play(drill, each)
        outcomes.table[each.stage, written] += 1
        outcomes.faults += [f"round {number}: {each}: {fault}" for fault in faults]
        with capsys.disabled():
            print(
                f"\nround {number}/{ROUNDS}, seed {SEED}: {each}; written: {written}; {faults or 'same bytes'}", end=""
            )
    with capsys.disabled():
        print(f"\n{outcomes}")
    assert not outcomes.faults


def play(drill: Drill, each: Round) -> tuple[str, list[str]]:
    """Play one round; returns what the stage had written when it was killed, and the faults afterwards."""
    drill.undo(each.stage)
    killed = Repro(drill.tree, each.stage, cold=each.cold)
    wait_for(drill, each, killed)
    killed.kill(each.victim)
    written = drill.written(each.stage)
    if (again := Repro(drill.tree, each.stage)).wait() != 0:
        failed = again.output
        if not drill.repaired() or (again := Repro(drill.tree, each.stage)).wait() != 0:
            return written, [f"the second run failed: {failed[-2000:]} {again.output[-2000:]}"]
        written = REPAIRED
    return written, drill.faults(each.stage)


def wait_for(drill: Drill, each: Round, running: Repro) -> None:
    """Wait for the moment of the kill, or the end of the process."""
    wait_until(lambda: running.began, running)
    if each.part is None:
        wait_until(lambda: drill.written(each.stage) != "nothing", running)
        time.sleep(each.delay)
        return
    limit = running.cpu_seconds() + each.part * drill.cpu_seconds[each.stage]
    while not running.ended() and running.cpu_seconds() < limit:
        time.sleep(POLL_SECONDS)
