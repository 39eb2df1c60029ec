"""Rehearsed-KV: what heads keep by their rank, and what they share by all the attention of the second reading."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sdk.planning import LAYERS, Model, plans_of
from thinkkv.sdk.budget import Budget, LayerBudget, LayerPrompt, even_layers
from thinkkv.sdk.plan import KeepPlan, PromptView
from thinkkv.sdk.policies import RehearsedKV

SCORES = ((1.0, 0.25), (0.5, 0.75))
PROBE = Model(kv_heads=2, group=1, windows=(None, None), tokens=100, seed=0)


def policy(**options: Any) -> RehearsedKV:
    """Small and simple: one rank's worth per score, no average over neighbours."""
    small = {"sinks": 2, "recent": 3, "whole": 26, "power": 1.0, "pooling": 1}
    return RehearsedKV(head_scores=SCORES, **small | options)


def plans(ratio: float, **options: Any) -> list[tuple[PromptView, LayerBudget, KeepPlan]]:
    found = plans_of(policy(**options), Budget(ratio=ratio), PROBE)
    assert found is not None
    return found


class TestByRank:
    """A head's rank says how many tokens it keeps for certain, the sharpest look-ups say which."""

    @pytest.mark.parametrize(
        ("options", "ratio", "expected"),
        [
            ({"by_rank": 1}, 0.5, [(80, 20), (40, 60)]),  # 200 tokens / 2.5
            ({"by_rank": 0.5}, 0.5, [(40, 10), (20, 30)]),
            ({"by_rank": 0}, 0.5, [(5, 5), (5, 5)]),  # both ends alone
            ({"by_rank": 1, "power": 0}, 0.5, [(50, 50), (50, 50)]),
            ({"by_rank": 1, "power": 2}, 0.3, [(63, 5), (15, 35)]),  # 3 are below the ends: 115 / 1.8125 for the others
            ({"by_rank": 1}, 0.8, [(100, 40), (80, 100)]),  # two heads have all, the others share 120 / .75
        ],
        ids=["in-proportion", "half", "nothing", "power-0", "floor", "full"],
    )
    def test_tokens_of_heads_by_hand(
        self, options: dict[str, Any], ratio: float, expected: list[tuple[int, ...]]
    ) -> None:
        assert [share.per_head for _, share, _ in plans(ratio, **options)] == expected

    @settings(deadline=None)
    @given(
        ratio=st.floats(0.1, 0.99),
        by_rank=st.floats(0, 1),
        power=st.floats(0, 20),
        kv_heads=st.integers(1, 5),
        data=st.data(),
    )
    def test_tokens_are_in_proportion_between_their_limits(
        self, ratio: float, by_rank: float, power: float, kv_heads: int, data: st.DataObject
    ) -> None:
        row = st.lists(st.floats(0.01, 1), min_size=kv_heads, max_size=kv_heads)
        scores = data.draw(st.lists(row, min_size=LAYERS, max_size=LAYERS))
        own = RehearsedKV(
            head_scores=tuple(map(tuple, scores)), by_rank=by_rank, power=power, sinks=1, recent=2, whole=17
        )
        layers = [LayerPrompt(i, kv_heads, 30 + 40 * i) for i in range(LAYERS)]
        shares = own.layer_budgets(layers, Budget(ratio=ratio))
        found = [
            (score**power, layer.visible, tokens)
            for row, layer, share in zip(scores, layers, shares, strict=True)
            for score, tokens in zip(row, share.per_head, strict=True)
        ]
        even = even_layers(layers, Budget(ratio=ratio))
        assert [share.tokens for share in shares] == [layer.tokens for layer in even]
        total = max(int(by_rank * sum(layer.tokens for layer in even)), 3 * len(found))
        used = sum(tokens for *_, tokens in found)
        assert total - len(found) < used <= total
        assert all(3 <= tokens <= most for _, most, tokens in found)
        # There is one unit that gives every head what it has, down to whole tokens and between the limits.
        reached = max((tokens / weight for weight, _, tokens in found if tokens > 3), default=0)
        assert all(reached <= (tokens + 1) / weight * (1 + 1e-9) for weight, most, tokens in found if tokens < most)


class TestTokens:
    """Which tokens are kept, against the rule in plain Python."""

    @pytest.mark.parametrize("windows", [(None, None), (None, 60), (40, 20)], ids=str)
    @pytest.mark.parametrize("pooling", [1, 3, 7])
    @pytest.mark.parametrize("by_rank", [0.0, 0.6, 1.0])
    def test_they_are_the_sharpest_of_each_head_and_then_the_most_used_of_all(
        self, by_rank: float, pooling: int, windows: tuple[int | None, ...]
    ) -> None:
        model = replace(PROBE, windows=windows)
        found = plans_of(policy(by_rank=by_rank, pooling=pooling), Budget(ratio=0.5), model)
        assert found is not None
        kept, others = set(), {}
        for view, share, _ in found:
            assert view.rehearsed is not None
            assert view.rehearsed_sum is not None
            for head in range(2):
                lengths = view.values[head].double().square().sum(dim=1).sqrt().tolist()
                most, taken = (
                    [a * b for a, b in zip(scores[head].tolist(), lengths, strict=True)]
                    for scores in (view.rehearsed, view.rehearsed_sum)
                )
                unit = sum(taken[2:-3]) ** 0.5
                certain = share.per_head[head] if share.per_head else view.tokens
                mine = sharpest(most, certain, pooling)
                kept |= {(view.layer, head, token) for token in mine}
                others |= {
                    (view.layer, head, token): taken[token] / unit for token in range(view.tokens) if token not in mine
                }
        left = sum(share.tokens for _, share, _ in found) - len(kept)
        kept |= set(sorted(others, key=lambda place: -others[place])[:left])
        for view, _, plan in found:
            for head, positions in enumerate(plan.kept):
                assert positions.tolist() == sorted(token for at, h, token in kept if (at, h) == (view.layer, head))

    @pytest.mark.parametrize("by_rank", [0.0, 0.6, 1.0])
    def test_nothing_of_the_budget_is_left(self, by_rank: float) -> None:
        assert sum(plan.tokens for *_, plan in plans(0.37, by_rank=by_rank)) == 2 * int(0.37 * 200)

    def test_a_layer_may_have_more_than_its_share(self) -> None:
        first, second = (PROBE.view(layer) for layer in range(2))
        assert first.rehearsed_sum is not None
        view = replace(first, rehearsed_sum=first.rehearsed_sum + 1000)
        budgets = policy(by_rank=0).layer_budgets([LayerPrompt(i, 2, 100) for i in range(2)], Budget(ratio=0.25))
        wide, narrow = policy(by_rank=0).plan_model([view, second], budgets)
        assert (wide.tokens, narrow.tokens) == (90, 10)


def sharpest(scores: list[float], count: int, pooling: int) -> set[int]:
    """The first two and last three of 5 or more tokens, and those between with the highest means of neighbours."""
    tokens, side = len(scores), pooling // 2
    means = [sum(scores[max(0, i - side) : i + side + 1]) / pooling for i in range(tokens)]
    between = sorted(range(2, tokens - 3), key=lambda i: -means[i])[: count - 5]
    return {0, 1, *between, *range(tokens - 3, tokens)}


def test_heads_that_keep_everything_are_heterogeneous() -> None:
    assert [plan.heterogeneous for *_, plan in plans(0.8, by_rank=1)] == [(0,), (1,)]
    assert [plan.heterogeneous for *_, plan in plans(0.5)] == [(), ()]


@pytest.mark.parametrize("ratio", [1.0, 0.8])
def test_of_a_prompt_that_is_kept_whole_they_are_the_best_fifth(ratio: float) -> None:
    scores = ((0.1, 0.2, 0.3, 0.4, 1.0), (0.5, 0.6, 0.7, 0.8, 0.9))
    model = Model(kv_heads=5, group=1, windows=(None, None), tokens=100 if ratio == 1 else 26, seed=0)
    found = plans_of(RehearsedKV(head_scores=scores, sinks=2, recent=3, whole=26), Budget(ratio=ratio), model)
    assert found is not None
    assert [plan.heterogeneous for *_, plan in found] == [(4,), (4,)]
    assert all(plan.tokens == 5 * view.tokens for view, _, plan in found)
