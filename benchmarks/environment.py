"""Where a measurement was made, and its results as a file: machine, versions, commit and command beside the rows."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from thinkkv.sdk.machine import machine, versions

PLACES = ("--out", "--scratch", "--folder")
"""Options that say where on this machine files go: they do not belong to a measurement."""


def save(path: Path, found: Mapping[str, Any]) -> None:
    """Write results with where and how they were made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**describe(), "command": shlex.join(_command()), **found}, indent=1) + "\n")


def describe() -> dict[str, Any]:
    """Machine, versions and commit as JSON values."""
    return {"machine": machine(), "versions": versions(), "commit": _commit()}


def _command() -> Iterator[str]:
    """This process's command without places."""
    yield f"benchmarks/{Path(sys.argv[0]).name}"
    arguments = iter(sys.argv[1:])
    for argument in arguments:
        if argument in PLACES:
            next(arguments)
        elif argument.partition("=")[0] not in PLACES:
            yield argument


def _commit() -> str:
    """Short commit hash, with ``+`` where the code differs from it; results are no code."""
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if found.returncode:
        return "unknown"
    code = [":(top)", ":(top,exclude)benchmarks/results"]
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code], check=False).returncode
    return found.stdout.strip() + ("+" if changed else "")
