"""Where and how a measurement was made: machine, versions, commit and command, as JSON values."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("thinkkv", "torch", "transformers", "trl", "peft", "onnxruntime")

PLACES = ("--out", "--scratch", "--folder")
"""Options that say where on a machine files go: they do not belong to a measurement."""


def described(program: str) -> dict[str, Any]:
    """All of it.

    Args:
        program: what the user called, before its arguments.
    """
    command = shlex.join([program, *_arguments()])
    return {"machine": machine(), "versions": versions(), "commit": commit(), "command": command}


def machine() -> dict[str, Any]:
    """Processor and its vector instructions, cores, torch's threads, memory and system."""
    import torch  # heavy: only a measurement asks

    return {
        "processor": _processor(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "system": platform.system(),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide a measurement, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Short commit hash of this checkout, with ``+`` where the code differs from it (results are no code).

    None where thinkkv is installed and no checkout.
    """
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=False)
        if tracked.returncode:
            return None
        found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    code = [":(top)", ":(top,exclude)benchmarks/results"]
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code], check=False).returncode
    return found.stdout.strip() + ("+" if changed else "")


def _arguments() -> Iterator[str]:
    """This process's arguments without places."""
    arguments = iter(sys.argv[1:])
    for argument in arguments:
        if argument in PLACES:
            next(arguments, None)
        elif argument.partition("=")[0] not in PLACES:
            yield argument


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    for line in information.read_text().splitlines() if information.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):  # not on Windows
        return None
