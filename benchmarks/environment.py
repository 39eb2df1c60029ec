"""Where a measurement was made: machine, versions and commit, written beside every row."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "thinkkv")


def describe() -> dict[str, Any]:
    """Machine, versions and commit as JSON values."""
    import torch

    return {
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "system": platform.system(),
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": _commit(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _commit() -> str:
    """Short commit hash, with ``+`` where the code differs from it."""
    here = Path(__file__).parent.parent
    run = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*"]
    found = subprocess.run(run, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
