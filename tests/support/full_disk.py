"""Run every stage on a disk that becomes full; `python -m tests.support.full_disk FOLDER DATABASE ROUNDS SEED`.

It mounts a file system in memory on `FOLDER`, so it needs a namespace of its own: `unshare --user --map-root-user
--mount`. In each round a file leaves less space than the stage and DVC need. Prints a line for each round, and exits
with 1 if there was a fault.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.stage_drill import STAGES, Drill, Repro

DISK_BYTES = 4 * 2**30
PAGE = 4096
MOST = 2.2
"""Largest free space as a multiple of what the stage writes; DVC's cache holds everything once more."""


def main(folder: Path, database: Path, rounds: int, seed: int) -> int:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(folder)], check=True)
    (folder / "tmp").mkdir()
    os.environ["TMPDIR"] = str(folder / "tmp")  # on the same disk
    drill = Drill.make(folder, database)
    chance = random.Random(seed)
    faults = 0
    for number in range(rounds):
        stage = STAGES[number % len(STAGES)]
        free = int(chance.uniform(0.0, MOST) * max(drill.bytes_of(stage), PAGE))
        outcome, found = play(drill, folder, stage, free)
        faults += len(found)
        print(
            f"round {number + 1}/{rounds}: {stage}, {free:,} bytes free: {outcome}; {found or 'same bytes'}", flush=True
        )
    return 1 if faults else 0


def play(drill: Drill, folder: Path, stage: str, free: int) -> tuple[str, list[str]]:
    """Run `stage` with `free` bytes of space, then with enough; returns how it ended, and the faults."""
    drill.undo(stage)
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(PAGE, shutil.disk_usage(folder).free - free))
    full = Repro(drill.tree, stage, log=folder.parent / "log")
    code = full.wait()
    outcome, faults = ("enough", []) if code == 0 else judged(drill, stage, full.output)
    ballast.unlink()
    again = Repro(drill.tree, stage)
    if again.wait() != 0 and drill.repaired():
        outcome += ", repaired by flows.recover"
        again = Repro(drill.tree, stage)
    if again.wait() != 0:
        return outcome, [*faults, f"the second run failed: {again.output[-2000:]}"]
    return outcome, faults + drill.faults(stage)


def judged(drill: Drill, stage: str, output: str) -> tuple[str, list[str]]:
    """How a run ended that had too little space, and what is wrong with that."""
    faults = [f"{path} is cut off" for path in drill.cut_off(stage)]
    if "Traceback" in output:
        faults.append(f"a stack trace: {output[-2000:]}")
    sentences = re.findall(rf"^{stage}: error: .*$", output, re.M)
    if sentences:
        if len(sentences) > 1 or "no space left on the device" not in sentences[0]:
            faults.append(f"the stage says {sentences}")
        return "one sentence of the stage", faults
    if "No space left on device" not in output and "disk is full" not in output:
        faults.append(f"DVC says {output[-1000:]}")
    return "one sentence of DVC", faults


if __name__ == "__main__":
    _, where, store, number, start = sys.argv
    sys.exit(main(Path(where), Path(store), int(number), int(start)))
