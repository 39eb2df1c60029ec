"""Speed and memory of runtimes, side by side: the quick forms' rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first script exports; the second takes what it would export alike."""
    return tmp_path_factory.mktemp("exported")


def test_all_runtimes_are_measured(run: Any, exported: Path) -> None:
    rows = {row["setting"]: row for row in run("export_speed", "rows.json", "--folder", exported)}
    assert len(rows) == 8
    assert 2 * rows["ours-int4-native-float16"]["cache_bytes"] == rows["ours-int4-native"]["cache_bytes"]
    assert all(row["decode_tokens_per_second"] > 1 < row["prefill_tokens_per_second"] for row in rows.values())
    assert all(row["peak_rss_bytes"] > row["cache_bytes"] > 0 for row in rows.values())


def test_rivals_answer_the_same_samples_and_hold_more(run: Any, tmp_path: Path, exported: Path) -> None:
    if (exported / "ready").exists():
        (tmp_path / "rivals" / "gguf").mkdir(parents=True)
        for there, here in (("stock", "stock"), ("checkpoint", "ours-checkpoint"), ("model.gguf", "gguf/model.gguf")):
            (tmp_path / "rivals" / here).symlink_to(exported / there)
    rows = {
        row["setting"]: row for row in run("rival_runtimes", "rows.json", "--here", "--folder", tmp_path / "rivals")
    }
    answers = json.loads((tmp_path / "rows.json").read_text())["answers"]
    assert {row["setting"] for row in answers} == rows.keys()
    assert all(row["score"] == 1 for row in answers if row["question"] == "in-window")
    asked_twice = {row["setting"] for row in answers if row["question"] == "after"}
    assert asked_twice == {"thinkkv on transformers", "onnxruntime-genai, our export"}
    assert all(row["decode_tokens_per_second"] > 1 < row["prefill_tokens_per_second"] for row in rows.values())
    ours, stock = (rows[f"onnxruntime-genai, {whose} export"]["cache_bytes"] for whose in ("our", "its"))
    assert ours < 0.5 * stock
    whole, *small = (row["cache_bytes"] for name, row in rows.items() if name.startswith("llama.cpp"))
    assert [bytes_ / whole for bytes_ in small] == [8.5 / 16, 4.5 / 16]
