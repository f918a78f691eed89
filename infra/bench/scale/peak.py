"""Run a command and print two peaks of its memory in bytes.

The first is what Linux reports for its process, or for the largest of its children, which includes files that it maps.
Until a new process runs its own program that is the memory of its parent, which must therefore be small: this file
imports nothing else. The second is the process's own memory, without mapped files, which is looked at all the time.

    python -I -S infra/bench/scale/peak.py COMMAND ...
"""

import os
import sys
import time

SECONDS = 0.01


def own(process: int) -> int:
    """Return the memory of a process that maps no file, in bytes."""
    try:
        with open(f"/proc/{process}/status", encoding="ascii") as status:  # noqa: PTH123 - pathlib is not small
            return next((int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon")), 0)
    except OSError:
        return 0


process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
most = 0
while not (found := os.wait4(process, os.WNOHANG))[0]:
    most = max(most, own(process))
    time.sleep(SECONDS)
_, status, usage = found
print(usage.ru_maxrss * 1024, most)  # kilobytes on Linux
sys.exit(os.waitstatus_to_exitcode(status))
