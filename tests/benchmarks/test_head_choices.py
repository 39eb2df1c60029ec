"""Choices of heads, compared by what a model answers: the quick forms' rows."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("script", ["head_choice", "head_choice_per_prompt", "profile_transfer"])
def test_choices_of_heads_are_compared_at_the_same_bytes(run: Any, script: str) -> None:
    rows = run(script, "")
    assert all(row["score"] == 1 for row in rows if row["policy"] == "full")
    held: dict[tuple[str, float], set[int]] = {}
    for row in rows:
        held.setdefault((row["question"], row["ratio"]), set()).add(row["used_bytes"])
    # Not quite: with a profile, rounding down to whole tokens falls on other heads.
    assert all(max(sizes) <= 1.001 * min(sizes) for sizes in held.values())
    assert {row["question"] for row in rows} == {"in-window", "after"}
