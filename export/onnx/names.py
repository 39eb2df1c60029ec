"""Names of values in a bundle's graph; onnxruntime-genai finds caches by theirs."""

from __future__ import annotations


def past(number: int, kind: str) -> str:
    """A cache before the call; ``kind`` is key or value."""
    return f"past_key_values.{number}.{kind}"


def present(number: int, kind: str) -> str:
    """The same cache after it."""
    return f"present.{number}.{kind}"


def cursor(output: str) -> str:
    """An output of one of the cursors."""
    return f"/thinkkv/{output}"


STEPS = cursor("steps")
"""StepCursor's output for layers that have no full heads."""

STEPS_WITH_FULL = cursor("steps_with_full")
"""The same for layers that have some."""

STEPS_ALL_FULL = cursor("steps_all_full")
"""The same for layers that have no others: there it is their ``by_products``."""
