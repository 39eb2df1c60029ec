"""What the tests of the benchmarks share: a quick form that runs to its end on the real model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path, smollm2: Any) -> Run:
    """Runs a script's quick form, and gives the rows that it writes; ``out`` is a file or a folder."""

    def quick(script: str, out: str, *more: object) -> list[dict[str, Any]]:
        command = [sys.executable, BENCHMARKS / f"{script}.py", "--quick", "--out", tmp_path / out, *more]
        environment = os.environ | {"TRITON_INTERPRET": "0"}
        done = subprocess.run(
            list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads((tmp_path / (out or ".") / ("" if out else f"{script}.json")).read_text())
        assert found.keys() >= {"machine", "versions", "commit", "command", "rows"}
        rows: list[dict[str, Any]] = found["rows"]
        return rows

    return quick
