"""Reread-KV: full heads by the profile, the rest by what the second reading looks up, against the rule in loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.sdk.planning import Model, plans_of
from thinkkv.sdk.budget import Budget, LayerBudget
from thinkkv.sdk.policies import RereadKV

SCORES = ((1.0, 0.25), (0.5, 0.75))
PROBE = Model(kv_heads=2, group=1, windows=(None, None), tokens=100, seed=0)


def policy(**options: Any) -> RereadKV:
    small = {"sinks": 2, "recent": 3, "whole": 26, "share": 0.25}
    return RereadKV(head_scores=SCORES, **small | options)


@given(
    windows=st.sampled_from([(None, None), (None, 60), (40, 30)]),
    share=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    ratio=st.floats(0.2, 0.95),
    seed=st.integers(0, 50),
)
def test_full_heads_and_the_best_of_the_rest_are_kept(
    windows: tuple[int | None, ...], share: float, ratio: float, seed: int
) -> None:
    model = replace(PROBE, windows=windows, seed=seed)
    found = plans_of(policy(share=share), Budget(ratio=ratio), model)
    assert found is not None
    total = sum(budget.tokens for _, budget, _ in found)
    visible = {view.layer: view.tokens for view, _, _ in found}
    best = sorted(((layer, head) for layer in range(2) for head in range(2)), key=lambda at: -SCORES[at[0]][at[1]])
    # As many full heads as leave the others both of their ends.
    full = best[: round(share * 4)]
    while full and total - sum(visible[layer] for layer, _ in full) < 5 * (4 - len(full)):
        full.pop()
    kept, others = set(), {}
    for view, budget, _ in found:
        assert view.rehearsed is not None
        assert view.rehearsed_sum is not None
        for head in range(2):
            for token in range(view.tokens):
                place = view.layer, head, token
                whole = budget.tokens == 2 * view.tokens  # where a window admits no more than an even share
                if whole or (view.layer, head) in full or token < 2 or token >= view.tokens - 3:
                    kept.add(place)
                else:
                    others[place] = view.rehearsed[head, token].item() * view.rehearsed_sum[head, token].item()
    order = sorted(others, key=lambda place: -others[place])
    left = total - len(kept)
    # Here scores are multiplied in float64: two of them at the cut that are one in float32 have no order.
    assume(not 0 < left < len(order) or others[order[left - 1]] > (1 + 1e-5) * others[order[left]])
    kept |= set(order[:left])
    for view, _, plan in found:
        for head, positions in enumerate(plan.kept):
            assert positions.tolist() == sorted(token for at, h, token in kept if (at, h) == (view.layer, head))
        named = best[: round(share * 4)] if plan.tokens == 2 * view.tokens else full
        assert plan.heterogeneous == tuple(sorted(head for layer, head in named if layer == view.layer))


def test_a_token_that_many_need_a_little_may_outrank_one_that_is_needed_once() -> None:
    view = PROBE.view(0)
    most, total = torch.zeros(2, *view.keys.shape[:2])
    most[:, 40], total[:, 40] = 0.9, 0.9  # one query looks it up
    most[:, 50], total[:, 50] = 0.1, 8.2  # many look at it a little: sqrt(.82) against .9
    most[:, 60], total[:, 60] = 0.1, 8.0
    view = replace(view, rehearsed=most, rehearsed_sum=total)
    plan = policy(share=0).plan(view, LayerBudget(2 * 7))
    assert [kept.tolist() for kept in plan.kept] == [[0, 1, 40, 50, 97, 98, 99]] * 2


def test_of_a_prompt_that_is_kept_whole_the_best_heads_are_still_named() -> None:
    found = plans_of(policy(), Budget(ratio=1.0), PROBE)
    assert found is not None
    assert [plan.heterogeneous for *_, plan in found] == [(0,), ()]
    assert all(plan.tokens == 200 for *_, plan in found)
