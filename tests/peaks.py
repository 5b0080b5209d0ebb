"""What work takes at its peak: in forks of one process that has imported everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

# Prints the forks' peaks in kB. A fork's peak begins with what it has then, which is the same for all.
_START = """
import json, os, sys
from pathlib import Path
exec(sys.argv[1])
for job in json.loads(sys.argv[3]):
    if os.fork() == 0:
        try:
            exec(sys.argv[2])
            status = open("/proc/self/status")
            print(next(line.split()[1] for line in status if line.startswith("VmHWM:")), flush=True)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(0)
    os.wait()
"""


def peaks(imports: str, work: str, jobs: Sequence[Any]) -> list[int]:
    """The bytes that `work`, Python, takes at most for each `job`; jobs: as JSON has them. Linux only."""
    done = subprocess.run(
        [sys.executable, "-c", _START, imports, work, json.dumps(jobs)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    found = [1024 * int(line) for line in done.stdout.splitlines()]
    assert len(found) == len(jobs), done.stderr
    return found
