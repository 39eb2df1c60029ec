"""The means of an evaluation, against values computed by hand."""

from __future__ import annotations

import pytest

from thinkkv.recipes.evaluation import Response, summarise


def response(
    lengths: tuple[int, ...],
    *,
    right: bool = True,
    weights: tuple[float, ...] = (),
    critical: tuple[bool, ...] | None = None,
) -> Response:
    steps = tuple("step" for _ in lengths)
    return Response("p", steps, weights, lengths, "a", right, sum(lengths) + 3, critical)


def test_known_steps_count_over_all_responses_and_estimates_over_right_ones() -> None:
    found = summarise(
        [
            response((7, 5), weights=(0.9, 0.1), critical=(True, False)),
            response((4, 6), weights=(0.2, 0.7), critical=(True, False)),
            response((8,), right=False, critical=(False,)),
        ]
    )
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.mean_tokens == pytest.approx((15 + 13 + 11) / 3)
    assert found.critical_share == pytest.approx(11 / 30)
    assert found.estimated_critical_share == pytest.approx(13 / 22)
    assert found.importance_auc == pytest.approx(3 / 4)  # .9 beats .1 and .7; .2 beats .1 alone
    assert found.ci95 == pytest.approx(1.96 * (2 / 9 / 3) ** 0.5)


def test_without_knowledge_the_share_is_the_estimate() -> None:
    found = summarise([response((3, 1), weights=(0.5, 0.49))])
    assert found.critical_share == found.estimated_critical_share == 0.75
    assert found.importance_auc is None


def test_nothing_right_and_no_steps_are_defined() -> None:
    found = summarise([response((), right=False)])
    assert (found.critical_share, found.estimated_critical_share, found.importance_auc) == (None, None, None)
