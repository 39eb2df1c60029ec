"""Results of a benchmark as a file: machine, versions, commit and command beside the rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thinkkv.sdk.machine import commit, described

_COMMIT = commit()
"""Where the run began: a checkout may move on while it lasts."""


def save(path: Path, found: Mapping[str, Any]) -> None:
    """Write results with where and how they were made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**describe(), **found}, indent=1) + "\n")


def describe() -> dict[str, Any]:
    """Machine, versions, commit and command as JSON values."""
    return described(f"benchmarks/{Path(sys.argv[0]).name}") | {"commit": _COMMIT}
