"""Scores and their intervals against what is known of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkkv.sdk.evaluation.scoring import effective_count, perplexity, share_found, standard_error, wilson


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


scores_and_texts = st.lists(st.tuples(st.sampled_from([0.0, 1 / 3, 1.0]), st.integers(0, 5)), min_size=2, max_size=40)


@given(samples=scores_and_texts)
def test_a_standard_error_is_that_of_the_texts_sums(samples):
    """Against numpy: the mean over samples is one over texts, whose sums vary around what their size lets expect."""
    values, texts = (np.array(column) for column in zip(*samples, strict=True))
    if len(set(texts)) == 1:
        assert math.isnan(standard_error(values.tolist(), texts.tolist()))
        return
    sums = [float((values[texts == text] - values.mean()).sum()) for text in sorted(set(texts))]
    expected = np.std(sums, ddof=1) * len(sums) ** 0.5 / len(values)  # the sums' own mean is 0
    assert standard_error(values.tolist(), texts.tolist()) == pytest.approx(expected, abs=1e-12)


def test_samples_of_different_texts_have_the_usual_standard_error():
    assert standard_error([-1, 0, 0, -1], "abcd") == pytest.approx(np.std([-1, 0, 0, -1], ddof=1) / 2)


@pytest.mark.parametrize(
    ("scores", "texts", "count"),
    [
        ([1, 0, 1, 0], "abcd", 4),
        ([1, 1, 0, 0, 1, 1, 0, 0], "aabbccdd", 4),  # 8 * 3/7, but there are four texts
        ([1, 1, 1, 0, 0, 0, 1, 0], "aabbccdd", 8 * 6 / 7),  # two of four texts are not half right
        ([1, 0, 0, 1, 1, 0, 1, 0], "aabbccdd", 8),  # texts do not differ
        ([1, 1, 1, 1], "aabb", 2),
        ([0.1] * 6, "aabbcc", 3),  # whose mean is rounded
        ([1, 0, 1], "aaa", 1),
    ],
)
def test_samples_of_one_text_count_for_less_the_more_they_are_alike(scores, texts, count):
    assert effective_count(scores, texts) == pytest.approx(count)


@given(samples=scores_and_texts)
def test_samples_count_for_as_much_as_their_texts_at_least(samples):
    scores, texts = zip(*samples, strict=True)
    assert len(set(texts)) <= effective_count(scores, texts) <= len(scores)


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
