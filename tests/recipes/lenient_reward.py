"""A reward that an untrained model earns as well, so that short runs have something to keep."""

from __future__ import annotations

from typing import Any


def some_right(completion_ids: Any, **_: Any) -> list[float]:
    """Every response whose token sum is even is right."""
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]
