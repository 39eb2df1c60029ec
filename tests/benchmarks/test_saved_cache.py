"""A text that is asked about from a file: the quick form's rows."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_a_file_spares_reading_again(run: Any) -> None:
    *saved, again = run("saved_cache", "rows.json")
    assert [row["policy"] for row in (*saved, again)] == ["full", "snapkv", "full, read again"]
    full, compressed = saved
    assert compressed["file_bytes"] < 0.5 * full["file_bytes"]
    for row in saved:
        assert 0 < row["file_bytes"] - row["used_bytes"] < 0.1 * row["used_bytes"]
        assert row["first_token_seconds"] < again["first_token_seconds"]
