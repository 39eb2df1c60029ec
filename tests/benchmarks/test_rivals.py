"""Rivals answer the samples of ``thinkkv eval``: what needs no package that is not here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RIVALS = Path(__file__).parents[2] / "benchmarks" / "rivals"
pytestmark = pytest.mark.slow


def script(name: str, *options: object) -> None:
    """Runs it to its end."""
    done = subprocess.run(
        [sys.executable, str(RIVALS / name), *map(str, options)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_quantized_cache_answers_and_goes_on_where_it_was_stopped(tmp_path: Path, smollm2: Any) -> None:
    shape = ("--context", 400, "--samples", 2, "--tasks", "niah-every-key")
    script("samples.py", *shape, "--out", tmp_path)
    out = tmp_path / "rows.jsonl"
    call = ("quantized_eval.py", "--folder", tmp_path, "--settings", "fp8", "--dtype", "float32", "--out", out)
    script(*call)
    written = out.read_text()
    head, *rows = map(json.loads, written.splitlines())
    assert head.keys() >= {"command", "commit", "dtype", "machine", "versions"}
    assert [(row["policy"], row["sample"]) for row in rows] == [
        (policy, sample) for sample in range(2) for policy in ("full", "transformers-fp8")
    ]
    for full, small in zip(rows[::2], rows[1::2], strict=True):
        assert full["divergence"] == 0 < small["divergence"] < 0.3
        assert 0.25 < small["cache_bytes"] / full["cache_bytes"] < 0.26
    out.write_text("".join(written.splitlines(keepends=True)[:3]))
    script(*call)
    again = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    assert [row["said"] for row in again] == [row["said"] for row in rows]
