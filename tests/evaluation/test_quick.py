"""The quick forms of `eval` and `bench` on the real model: a table, a picture and rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def quick(thinkkv: Any, smollm2: Any, tmp_path: Path) -> Any:
    """Runs a command's quick form on the real model, and gives its JSON."""

    def run(command: str, *more: str) -> Any:
        done = thinkkv(command, "--model", "smollm2-135m", "--quick", "--out", str(tmp_path), "--json", *more)
        assert done.code == 0, done.err
        return done.json

    return run


def test_eval_keeps_a_needle_with_the_whole_cache_and_holds_fewer_bytes_with_less(quick: Any, tmp_path: Path) -> None:
    rows = quick("eval", "--policies", "full,task-kv", "--ratio", "0.4")["rows"]
    assert {row["task"] for row in rows} == {"niah-single", "passkey", "perplexity"}
    full, ours = ([row for row in rows if row["policy"] == policy] for policy in ("full", "task-kv"))
    assert all(row["score"] == 1 for row in full if row["task"] == "niah-single")
    assert all(row["used_bytes"] < 0.45 * whole["used_bytes"] for row, whole in zip(ours, full, strict=True))
    assert (tmp_path / "scores.png").stat().st_size > 10_000


def test_bench_measures_speed_and_real_bytes(quick: Any, tmp_path: Path) -> None:
    rows = {row["policy"]: row for row in quick("bench", "--ratio", "0.4")["rows"]}
    assert set(rows) == {"stock", "full", "task-kv"}
    assert all(row["decode_tokens_per_second"] > 1 for row in rows.values())
    assert rows["task-kv"]["used_bytes"] < 0.45 * rows["full"]["used_bytes"]
    assert (tmp_path / "speed.png").stat().st_size > 10_000
