"""Rows of a table, from outcomes that are written down."""

from __future__ import annotations

from pathlib import Path

import pytest

from thinkkv.sdk.evaluation.journal import Journal, Outcome
from thinkkv.sdk.evaluation.rows import rows
from thinkkv.sdk.evaluation.runner import Cell
from thinkkv.sdk.evaluation.scoring import wilson
from thinkkv.sdk.evaluation.setting import settings
from thinkkv.sdk.evaluation.tasks import GENERATED


@pytest.mark.parametrize(("task", "count"), [("niah-every-key", 2), ("niah-multikey", 8)])
def test_an_interval_is_wider_where_questions_of_one_text_are_answered_alike(
    tmp_path: Path, task: str, count: float
) -> None:
    journal = Journal(tmp_path / "samples.jsonl", {})
    scores = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    journal.add(Outcome(task, "after", 500, i, "snapkv", 0.5, 500, score, "", 1, 1) for i, score in enumerate(scores))
    (row,) = rows(journal, [Cell(GENERATED[task], 500, "after")], settings(["snapkv"], [0.5]), 8)
    assert row["ci95"] == pytest.approx(wilson(5 / 8, count), abs=1e-4)
