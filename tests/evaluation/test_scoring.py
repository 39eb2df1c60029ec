"""Scores and their intervals against what is known of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkkv.sdk.evaluation.scoring import perplexity, share_found, wilson


def test_wilson_has_the_textbook_values():
    low, high = wilson(0.5, 100)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)
    assert wilson(0.0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


@given(right=st.integers(0, 50), count=st.integers(1, 50))
def test_wilson_bounds_solve_the_score_equation(right, count):
    """Both bounds p satisfy |mean - p| = z sqrt(p (1 - p) / n), the definition of the interval."""
    mean = min(right, count) / count
    for bound in wilson(mean, count):
        if 1e-9 < bound < 1 - 1e-9:
            assert abs(mean - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / count), abs=1e-9)


@pytest.mark.parametrize(
    ("said", "share"),
    [(" 12345. And", 0.5), ("123456", 0.0), ("Kitchen, 12345", 1.0), ("kitchens", 0.0), ("", 0.0)],
)
def test_answers_count_as_whole_words(said, share):
    assert share_found(["12345", "kitchen"], said) == share


def test_perplexity_is_the_exponential_of_the_mean_loss():
    value, interval = perplexity([1.0, 3.0])
    assert value == pytest.approx(math.exp(2))
    assert interval == pytest.approx((math.exp(2 - 1.959964), math.exp(2 + 1.959964)))
    assert perplexity([2.0]) == (pytest.approx(math.exp(2)), None)
