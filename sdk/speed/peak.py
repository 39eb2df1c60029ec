"""Peak memory of a process that does nothing but one contender's job; run as ``python -m thinkkv.sdk.speed.peak``."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from thinkkv.patches.errors import ThinkKVError

STEPS = 4


def peak_rss(job: dict[str, Any]) -> int:
    """Peak resident bytes of one contender, in a process of its own.

    Args:
        job: ``contender``, the name of a function (``module:name``) that makes one and its prompt of the job; what
            else that function needs.

    Raises:
        ThinkKVError: the process failed.
    """
    command = [sys.executable, "-m", "thinkkv.sdk.speed.peak", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["killed"])[-1][:200]
        raise ThinkKVError(f"measuring peak memory failed ({reason}) - free some memory, or give --no-memory")
    return int(done.stdout.split()[-1])


def _run(job: dict[str, Any]) -> None:
    contender, ids = resolve_name(job["contender"])(job)
    with contender.ready():
        contender.prefill(ids, STEPS + 1)
        for _ in range(STEPS):
            contender.step()
    print(own_peak())  # noqa: T201  (read by the parent)


def own_peak() -> int:
    """Peak resident bytes of this process.

    On Linux from /proc, because the maximum that getrusage knows is handed down from the parent process.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    _run(json.loads(sys.argv[1]))
