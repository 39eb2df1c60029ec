"""Packed importance equals the naive form, and both equal sums of log-probabilities written out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_models import VOCABULARY, new_model
from thinkkv.recipes.smartthinker.importance import (
    ESTIMATORS,
    batches,
    probe,
    score_naive,
    score_packed,
    takes_masks,
    weight,
)
from thinkkv.recipes.smartthinker.steps import Steps

PROMPT = (3, 4, 5)


@pytest.fixture(scope="module")
def model():
    return new_model("llama", 4)


def steps_of(lengths: list[int], answer: int) -> Steps:
    edges = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    return Steps(tuple(itertools.pairwise(edges)), edges[-1], edges[-1] + answer, True)


def response_of(steps: Steps, seed: int = 0) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (steps.length,), generator=draw).tolist()


def log_probability(model, context: list[int], tail: list[int]) -> float:
    """log P(tail | context), one token at a time."""
    total = 0.0
    with torch.no_grad():
        for index, token in enumerate(tail):
            logits = model(torch.tensor([[*context, *tail[:index]]])).logits[0, -1]
            total += float(logits.double().log_softmax(-1)[token])
    return total


def test_next_steps_by_hand(model) -> None:
    steps = steps_of([2, 3, 2, 1], 2)
    response = response_of(steps)
    found = score_packed(model, [probe(PROMPT, response, steps, estimator="next-steps", window=2)])[0]
    p = list(PROMPT)
    expected = [
        log_probability(model, p + response[:end], response[end:stop])
        - log_probability(model, p + response[:start], response[end:stop])
        for (start, end), stop in zip(steps.spans, (7, 8, 10, 10), strict=True)
    ]
    assert found == pytest.approx(expected, abs=1e-4)


def test_answer_removal_by_hand(model) -> None:
    steps = steps_of([2, 3], 2)
    response = response_of(steps)
    found = score_packed(model, [probe(PROMPT, response, steps, estimator="answer-removal")])[0]
    p, answer = list(PROMPT), response[5:]
    whole = log_probability(model, p + response[:5], answer)
    expected = [
        whole - log_probability(model, p + response[2:5], answer),
        whole - log_probability(model, p + response[:2], answer),
    ]
    assert found == pytest.approx(expected, abs=1e-4)


def test_prefix_gain_by_hand(model) -> None:
    steps = steps_of([2, 3], 2)
    response = response_of(steps)
    found = score_packed(model, [probe(PROMPT, response, steps, estimator="prefix-gain")])[0]
    p, answer = list(PROMPT), response[5:]
    values = [log_probability(model, p + response[:end], answer) for end in (0, 2, 5)]
    assert found == pytest.approx([values[1] - values[0], values[2] - values[1]], abs=1e-4)


@settings(max_examples=12)
@given(
    shapes=st.lists(
        st.tuples(st.lists(st.integers(1, 6), max_size=6), st.integers(0, 3)).filter(lambda it: sum(it[0]) + it[1]),
        min_size=1,
        max_size=4,
    ),
    estimator=st.sampled_from(ESTIMATORS),
    window=st.integers(1, 3),
    budget=st.sampled_from([1, 200, 10_000]),
)
def test_packed_equals_naive(model, shapes, estimator, window, budget) -> None:
    probes = []
    for seed, (lengths, answer) in enumerate(shapes):
        steps = steps_of(lengths, answer)
        probes.append(probe(PROMPT, response_of(steps, seed), steps, estimator=estimator, window=window))
    packed, naive = score_packed(model, probes, max_tokens=budget), score_naive(model, probes)
    assert [len(row) for row in packed] == [len(lengths) for lengths, _ in shapes]
    for got, wanted in zip(packed, naive, strict=True):
        assert got == pytest.approx(wanted, abs=1e-4)


def test_packed_equals_naive_with_eager_attention() -> None:
    eager = new_model("qwen3", 2)
    eager.set_attn_implementation("eager")
    steps = steps_of([3, 4, 2], 2)
    probes = [probe(PROMPT, response_of(steps), steps, estimator="next-steps")]
    assert score_packed(eager, probes)[0] == pytest.approx(score_naive(eager, probes)[0], abs=1e-4)


@pytest.mark.parametrize(("variant", "exact"), [("llama", True), ("mistral", True), ("mistral-window", False)])
def test_a_sliding_window_is_not_packed(variant: str, exact: bool) -> None:
    assert takes_masks(new_model(variant, 2)) is exact


def test_a_copied_step_is_worth_more_than_one_that_nothing_follows_from(model) -> None:
    assert weight(-3.0, 1.0) == 0.0
    assert weight(0.0, 1.0) == 0.0
    assert weight(1.0, 1.0) == pytest.approx(1 - math.exp(-1))
    assert weight(1e9, 1.0) <= 1.0


def test_every_distinct_probe_with_steps_is_in_exactly_one_forward() -> None:
    rows = [probe(PROMPT, [1] * n, steps_of([n - 1], 1), estimator="next-steps") for n in (5, 30, 2, 9, 5)]
    rows.append(probe(PROMPT, [1], steps_of([], 1), estimator="next-steps"))
    chosen = batches(rows, 40)
    assert sorted(row.tokens for batch in chosen for row in batch) == sorted(row.tokens for row in rows[:4])
    for batch in chosen:
        assert len(batch) == 1 or batch[0].tokens * len(batch) <= 40
        assert batch[0].tokens <= 2 * batch[-1].tokens


def test_equal_responses_get_equal_scores_from_one_forward(model) -> None:
    steps = steps_of([2, 3], 1)
    row = probe(PROMPT, response_of(steps), steps, estimator="next-steps")
    first, second = score_packed(model, [row, row])
    assert first == second
    assert len(first) == 2
