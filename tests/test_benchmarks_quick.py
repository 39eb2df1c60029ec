"""The quick forms of the benchmarks run to their end on the real model, and their rows hold what must be so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
Run = Callable[..., list[dict[str, Any]]]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("smollm2")]


@pytest.fixture
def run(tmp_path: Path) -> Run:
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


@pytest.mark.parametrize("script", ["head_choice", "head_choice_per_prompt", "profile_transfer"])
def test_choices_of_heads_are_compared_at_the_same_bytes(run: Run, script: str) -> None:
    rows = run(script, "")
    assert all(row["score"] == 1 for row in rows if row["policy"] == "full")
    held: dict[tuple[str, float], set[int]] = {}
    for row in rows:
        held.setdefault((row["question"], row["ratio"]), set()).add(row["used_bytes"])
    # Not quite: with a profile, rounding down to whole tokens falls on other heads.
    assert all(max(sizes) <= 1.001 * min(sizes) for sizes in held.values())
    assert {row["question"] for row in rows} == {"in-window", "after"}


def test_a_bundle_and_a_gguf_file_say_what_pytorch_says(run: Run) -> None:
    *bundle, gguf = run("export_equality", "rows.json")
    assert [row["native"] for row in bundle] == [False, False, True, True]
    for onnx, perplexity in (bundle[:2], bundle[2:]):
        assert onnx["equal_until"] == onnx["compared"] == 20
        assert perplexity["perplexity"] == pytest.approx(perplexity["perplexity_full_cache_float32"], rel=0.2)
    assert gguf["equal_text"]


def test_all_runtimes_are_measured(run: Run, tmp_path: Path) -> None:
    rows = {row["setting"]: row for row in run("export_speed", "rows.json", "--folder", tmp_path / "speed")}
    assert len(rows) == 8
    assert 2 * rows["ours-int4-native-float16"]["cache_bytes"] == rows["ours-int4-native"]["cache_bytes"]
    assert all(row["decode_tokens_per_second"] > 1 < row["prefill_tokens_per_second"] for row in rows.values())
    assert all(row["peak_rss_bytes"] > row["cache_bytes"] > 0 for row in rows.values())


def test_rivals_answer_the_same_samples_and_hold_more(run: Run, tmp_path: Path) -> None:
    rows = {
        row["setting"]: row for row in run("rival_runtimes", "rows.json", "--here", "--folder", tmp_path / "rivals")
    }
    answers = json.loads((tmp_path / "rows.json").read_text())["answers"]
    assert {row["setting"] for row in answers} == rows.keys()
    assert all(row["score"] == 1 for row in answers if row["question"] == "in-window")
    assert all(row["decode_tokens_per_second"] > 1 < row["prefill_tokens_per_second"] for row in rows.values())
    ours, stock = (rows[f"onnxruntime-genai, {whose} export"]["cache_bytes"] for whose in ("our", "its"))
    assert ours < 0.5 * stock


def test_int4_costs_perplexity_and_saves_bytes(run: Run) -> None:
    full, int4 = run("int4_methods", "rows.json")
    assert int4["data_bytes"] < 0.2 * full["data_bytes"]
    assert full["perplexity"] < int4["perplexity"] < 2 * full["perplexity"]
