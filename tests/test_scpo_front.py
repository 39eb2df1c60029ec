"""The statistics behind what is said of SCPO's front: against tables, by hand, and as laws."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # scripts, no package

from intervals import interval, student
from scpo_front import best_accuracy, fewest_tokens

POINT = st.tuples(st.floats(20, 60), st.floats(0.5, 1.0))


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_student_s_quantiles_are_the_tables(freedom: int, quantile: float) -> None:
    assert student(0.975, freedom) == pytest.approx(quantile, abs=1e-3)


def test_an_interval_by_hand() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / math.sqrt(3), abs=1e-3))
    assert interval([1.0, 2.0, 3.0], comparisons=8)[1] > 2 * half
    assert math.isnan(interval([1.0])[1])


def test_the_front_by_hand() -> None:
    front = [(30.0, 0.8), (40.0, 0.9), (38.0, 0.7)]
    assert best_accuracy(front, 35.0) == pytest.approx(0.85)
    assert best_accuracy(front, 50.0) == 0.9
    assert best_accuracy(front, 20.0) == 0.8  # none is so short: the shortest, though it is longer
    assert fewest_tokens(front, 0.85) == pytest.approx(35.0)
    assert fewest_tokens(front, 0.5) == 30.0
    assert fewest_tokens(front, 0.95) == 40.0  # none is so accurate: the most accurate


@given(st.lists(POINT, min_size=1, max_size=6), POINT)
def test_more_penalties_never_lower_the_front(front: list[tuple[float, float]], other: tuple[float, float]) -> None:
    tokens = max(point[0] for point in front)
    assert best_accuracy([*front, other], tokens) >= best_accuracy(front, tokens) - 1e-9
    accuracy = min(point[1] for point in front)
    assert fewest_tokens([*front, other], accuracy) <= fewest_tokens(front, accuracy) + 1e-9
