"""What every policy promises, over a space of prompts and budgets, and what each one adds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sdk.planning import LAYERS, Model, plans_of
from thinkkv import sdk
from thinkkv.sdk.budget import Budget, LayerBudget, LayerPrompt, even_layers
from thinkkv.sdk.compression import Compression
from thinkkv.sdk.plan import PromptView
from thinkkv.sdk.policies import (
    POLICIES,
    AdaKV,
    Full,
    KVzip,
    Policy,
    PyramidKV,
    RehearsedKV,
    RereadKV,
    RetrievalKV,
    SnapKV,
    StreamingLLM,
    TaskKV,
    policy_named,
)

NAMES = tuple(POLICIES)


@st.composite
def models(draw: st.DrawFn) -> Model:
    window = st.sampled_from([None, None, 20, 60])
    return Model(
        kv_heads=draw(st.integers(1, 5)),
        group=draw(st.integers(1, 3)),
        windows=tuple(draw(window) for _ in range(LAYERS)),
        tokens=draw(st.integers(1, 150)),
        seed=draw(st.integers(0, 10_000)),
    )


@st.composite
def policies(draw: st.DrawFn, name: str, model: Model) -> Policy:
    """A policy with options small enough for prompts of a hundred tokens."""
    voting = {"observation_window": draw(st.integers(1, 8)), "pooling": draw(st.sampled_from([1, 3, 7]))}
    ends = {"sinks": draw(st.integers(0, 6)), "recent": voting["observation_window"] + draw(st.integers(0, 20))}
    whole = {"whole": draw(st.integers(0, 100))}
    scores = model.head_scores()
    options: dict[str, dict[str, Any]] = {
        "full": {},
        "streaming-llm": {"sinks": ends["sinks"]},
        "kvzip": ends | whole,
        "snapkv": voting,
        "pyramidkv": voting | {"beta": draw(st.integers(1, 30))},
        "adakv": voting | {"floor": draw(st.floats(0, 1))},
        "retrieval-kv": voting | ends | {"head_scores": scores, "share": draw(st.floats(0, 1))},
        "evidence-kv": voting
        | ends
        | {"head_scores": scores, "share": draw(st.floats(0, 1)), "floor": draw(st.floats(0, 1))},
        "reread-kv": ends | whole | {"head_scores": scores, "share": draw(st.floats(0, 1))},
        "matched-kv": ends
        | whole
        | {"head_scores": scores, "share": draw(st.floats(0, 1)), "ridge": draw(st.floats(1e-3, 10))},
        "rehearsed-kv": ends
        | whole
        | {
            "head_scores": scores,
            "by_rank": draw(st.floats(0, 1)),
            "power": draw(st.floats(0, 20)),
            "pooling": voting["pooling"],
        },
        "task-kv": voting
        | ends
        | {
            "nearest": draw(st.sampled_from(["inside", "on-top", "none"])),
            "rounding": draw(st.sampled_from(["nearest", "floor", "ceil"])),
            "unit": draw(st.sampled_from(["query", "kv"])),
            "beta": draw(st.sampled_from([None, 0.0, 0.5, 1.0])),
            "head_scores": draw(st.sampled_from([None, scores])),
        },
    }
    return POLICIES[name](**options[name])


budgets = st.one_of(
    st.builds(Budget, ratio=st.floats(0.01, 1.0)),
    st.builds(Budget, tokens=st.integers(1, 150)),
)


def must_keep(policy: Policy, tokens: int) -> tuple[int, int]:
    """Sinks and most recent tokens that every head has for certain, however tight the budget."""
    if isinstance(policy, (TaskKV, RetrievalKV)):
        return policy.sinks, policy.observation_window
    if isinstance(policy, SnapKV):
        return 0, policy.observation_window
    if isinstance(policy, StreamingLLM):
        return policy.sinks, 1
    if isinstance(policy, (KVzip, RehearsedKV, RereadKV)):
        return policy.sinks, policy.recent
    return tokens, 0


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_plan_is_in_range_in_order_and_within_the_budget(name: str, data: st.DataObject) -> None:
    model = data.draw(models())
    policy = data.draw(policies(name, model))
    budget = Budget(ratio=1.0) if name == "full" else data.draw(budgets)
    plans = plans_of(policy, budget, model)
    if plans is None:
        lowest = min(budget.tokens_per_head(view) for view in _compressed(policy, model))
        assert lowest < policy.smallest
        return
    for view, share, plan in plans:
        assert len(plan.kept) == model.kv_heads
        assert plan.tokens <= share.tokens or policy.compares_layers  # which may spend a share elsewhere
        sinks, recent = must_keep(policy, view.tokens)
        ends = {*range(min(sinks, view.tokens)), *range(max(0, view.tokens - recent), view.tokens)}
        for kept in (positions.tolist() for positions in plan.kept):
            assert kept == sorted(set(kept))
            assert set(kept) <= set(range(view.tokens))
            assert ends <= set(kept)
    promised = sum(Compression(policy, budget, model.shapes()).promised_tokens(model.tokens))
    assert sum(plan.tokens for _, _, plan in plans) <= promised


def _compressed(policy: Policy, model: Model) -> list[int]:
    visible = [shape.visible(model.tokens) for shape in model.shapes()]
    return [tokens for tokens in visible if tokens > policy.always_kept]


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_ratio_one_keeps_everything(name: str, data: st.DataObject) -> None:
    model = data.draw(models())
    plans = plans_of(data.draw(policies(name, model)), Budget(ratio=1.0), model)
    assert plans is not None
    assert all(plan.tokens == view.tokens * model.kv_heads for view, _, plan in plans)


def defaults(name: str, model: Model) -> Policy:
    """The policy as its users have it, with a profile where it needs one."""
    policy: Any = policy_named(name)
    return replace(policy, head_scores=model.head_scores()) if policy.profile_score == "retrieval" else policy


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_of_its_ends_alone_is_kept_whole(name: str) -> None:
    probe = Model(kv_heads=2, group=2, windows=(None,) * 2, tokens=1, seed=0)
    policy = defaults(name, probe)
    for tokens in {1, max(1, policy.always_kept)}:
        model = Model(2, 2, (None,) * 2, tokens, seed=0)
        plans = plans_of(policy, Budget(ratio=0.01), model)
        assert plans is not None
        assert all(plan.tokens == 2 * tokens for _, _, plan in plans)


@pytest.mark.parametrize("tokens", [49, 128, 272, 273])
@pytest.mark.parametrize(
    "name", ["task-kv", "retrieval-kv", "evidence-kv", "rehearsed-kv", "reread-kv", "matched-kv", "kvzip"]
)
def test_a_quarter_of_a_short_prompt_is_never_too_little(name: str, tokens: int) -> None:
    probe = Model(kv_heads=2, group=2, windows=(None,) * 2, tokens=tokens, seed=0)
    policy = defaults(name, probe)
    plans = plans_of(policy, Budget(ratio=0.25), probe)
    assert plans is not None, "refused"
    whole = [plan.tokens == 2 * tokens for _, _, plan in plans]
    assert all(whole) if tokens <= 272 else not any(whole)


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_is_found_by_its_name(name: str) -> None:
    assert POLICIES[name].name == policy_named(name).name == name


def test_an_unknown_policy_is_told_the_known_ones() -> None:
    with pytest.raises(sdk.BudgetError, match="no policy 'h2o' - choose one of full, task-kv"):
        policy_named("h2o")


def test_full_keeps_everything_at_any_budget() -> None:
    model = Model(kv_heads=3, group=2, windows=(None, 20, None), tokens=90, seed=1)
    plans = plans_of(Full(), Budget(ratio=0.1), model)
    assert plans is not None
    assert [plan.tokens for _, _, plan in plans] == [270, 57, 270]


def test_streaming_llm_keeps_both_ends_in_every_head() -> None:
    view = Model(kv_heads=2, group=1, windows=(None,), tokens=50, seed=0).view(0)
    plan = StreamingLLM(sinks=4).plan(view, LayerBudget(2 * 10))
    assert [kept.tolist() for kept in plan.kept] == [[0, 1, 2, 3, *range(44, 50)]] * 2


def test_snapkv_keeps_the_tokens_that_each_head_attends_to() -> None:
    keys = torch.zeros(2, 50, 4)
    keys[0, 11, 0] = keys[1, 33, 0] = 20.0
    queries = torch.ones(2, 50, 4)
    view = PromptView(0, 1, queries, keys, keys, scale=0.5)
    plan = SnapKV(observation_window=4, pooling=3).plan(view, LayerBudget(2 * 7))
    assert [kept.tolist() for kept in plan.kept] == [[10, 11, 12, *range(46, 50)], [32, 33, 34, *range(46, 50)]]


class TestPyramidKV:
    """Layer budgets in an arithmetic series around the even one."""

    @settings(deadline=None)
    @given(
        tokens=st.integers(40, 5000),
        kv_heads=st.integers(1, 32),
        layers=st.integers(1, 48),
        ratio=st.floats(0.05, 1.0),
        beta=st.integers(1, 40),
    )
    def test_budgets_sum_to_at_most_the_even_sum_and_never_rise(
        self, tokens: int, kv_heads: int, layers: int, ratio: float, beta: int
    ) -> None:
        prompts = [LayerPrompt(layer, kv_heads, tokens) for layer in range(layers)]
        budget = Budget(ratio=ratio)
        policy = PyramidKV(beta=beta, observation_window=8)
        if budget.tokens_per_head(tokens) < policy.smallest:
            return
        shares = [layer.tokens for layer in policy.layer_budgets(prompts, budget)]
        assert sum(shares) <= sum(layer.tokens for layer in even_layers(prompts, budget))
        assert shares == sorted(shares, reverse=True)
        assert all(policy.observation_window * kv_heads <= share <= tokens * kv_heads for share in shares)

    def test_by_hand(self) -> None:
        # Even: 400 tokens, 8 * 4 of them the window. The top layer votes for 368 / 20 = 18.4: 349.6 fewer.
        prompts = [LayerPrompt(layer, 4, 1000) for layer in range(5)]
        shares = PyramidKV(observation_window=8).layer_budgets(prompts, Budget(ratio=0.1))
        assert [share.tokens for share in shares] == [749, 574, 400, 225, 50]

    def test_a_single_layer_has_the_even_budget(self) -> None:
        shares = PyramidKV().layer_budgets([LayerPrompt(0, 2, 1000)], Budget(ratio=0.25))
        assert shares == [LayerBudget(500)]

    def test_sums_over_layers_with_windows_stay_within_the_promise(self) -> None:
        prompts = [LayerPrompt(0, 2, 1000), LayerPrompt(1, 2, 100), LayerPrompt(2, 2, 1000)]
        budget = Budget(ratio=0.5)
        shares = PyramidKV(observation_window=8).layer_budgets(prompts, budget)
        assert sum(share.tokens for share in shares) <= 2 * 1050
        assert all(share.tokens <= 2 * prompt.visible for share, prompt in zip(shares, prompts, strict=True))


class TestAdaKV:
    """One ranking over the heads of a layer, with a floor."""

    def view(self) -> PromptView:
        """Head 0 spreads its attention over many tokens, head 1 puts all of it on one."""
        keys = torch.zeros(2, 80, 4)
        keys[1, 40, 0] = 40.0
        return PromptView(0, 1, torch.ones(2, 80, 4), keys, keys, scale=0.5)

    @pytest.mark.parametrize(("floor", "poor"), [(0.0, 1), (0.2, 4), (0.5, 8), (1.0, 16)])
    def test_the_concentrated_head_gets_one_winner_and_its_floor(self, floor: float, poor: int) -> None:
        # 20 tokens a head, 4 of them the window: 32 voted tokens. The spread head wins 31 of them, the other one.
        plan = AdaKV(observation_window=4, pooling=1, floor=floor).plan(self.view(), LayerBudget(40))
        spread, concentrated = (len(kept) - 4 for kept in plan.kept)
        assert concentrated == int((1 - floor) * 1 + floor * 16) == pytest.approx(poor, abs=1)
        assert spread == int((1 - floor) * 31 + floor * 16)
        assert 40 in plan.kept[1].tolist()

    @settings(deadline=None, max_examples=40)
    @given(seed=st.integers(0, 1000), floor=st.floats(0, 1), each=st.integers(6, 70), kv_heads=st.integers(1, 5))
    def test_every_head_has_its_floor(self, seed: int, floor: float, each: int, kv_heads: int) -> None:
        view = Model(kv_heads, 2, (None,), 80, seed).view(0)
        plan = AdaKV(observation_window=4, floor=floor).plan(view, LayerBudget(each * kv_heads))
        assert all(len(kept) >= 4 + int(floor * (each - 4)) for kept in plan.kept)

    def test_full_floor_is_snapkv(self) -> None:
        view = Model(3, 2, (None,), 80, seed=3).view(0)
        even = SnapKV(observation_window=4).plan(view, LayerBudget(60))
        floored = AdaKV(observation_window=4, floor=1.0).plan(view, LayerBudget(60))
        assert [kept.tolist() for kept in floored.kept] == [kept.tolist() for kept in even.kept]


class TestRetrievalKV:
    """The best heads of the whole model are full."""

    SCORES = ((0.9, 0.1, 0.2, 0.3), (0.8, 0.7, 0.0, 0.4))

    def policy(self, share: float = 0.375) -> RetrievalKV:
        return RetrievalKV(head_scores=self.SCORES, share=share, sinks=2, recent=8, observation_window=4)

    def prompts(self, tokens: int) -> list[LayerPrompt]:
        return [LayerPrompt(layer, 4, tokens) for layer in range(2)]

    def test_ranking_is_over_all_layers_at_once(self) -> None:
        shares = self.policy().layer_budgets(self.prompts(100), Budget(ratio=0.5))
        assert [share.full_heads for share in shares] == [(0,), (0, 1)]
        # 400 tokens less 3 * 100, over 5 heads: 20 each.
        assert [share.tokens for share in shares] == [100 + 3 * 20, 200 + 2 * 20]

    @pytest.mark.parametrize(
        ("ratio", "full"),
        [(0.44, [(0,), (0, 1)]), (0.42, [(0,), (0,)]), (0.22, [(0,), ()]), (0.15, [(), ()])],
        ids=["three", "two", "one", "none"],
    )
    def test_the_share_falls_where_the_others_would_lose_their_ends(
        self, ratio: float, full: list[tuple[int, ...]]
    ) -> None:
        shares = self.policy().layer_budgets(self.prompts(100), Budget(ratio=ratio))
        assert [share.full_heads for share in shares] == full
        assert sum(share.tokens for share in shares) <= ratio * 800

    def test_plan_keeps_full_heads_whole_and_the_others_ends(self) -> None:
        model = Model(kv_heads=4, group=1, windows=(None, None), tokens=100, seed=0)
        plans = plans_of(self.policy(), Budget(ratio=0.5), model)
        assert plans is not None
        lengths = [[len(kept) for kept in plan.kept] for _, _, plan in plans]
        assert lengths == [[100, 20, 20, 20], [100, 100, 20, 20]]
        assert [plan.heterogeneous for _, _, plan in plans] == [(0,), (0, 1)]

    def test_without_a_profile_it_says_where_to_get_one(self) -> None:
        with pytest.raises(sdk.ProfileMismatchError, match="thinkkv patch --score retrieval"):
            RetrievalKV().layer_budgets(self.prompts(1000), Budget(ratio=0.5))


@pytest.mark.parametrize("window", [20, 60])
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_no_policy_sees_tokens_that_the_window_excludes(window: int, data: st.DataObject) -> None:
    model = Model(kv_heads=2, group=2, windows=(window,), tokens=data.draw(st.integers(1, 150)), seed=0)
    name = data.draw(st.sampled_from(NAMES))
    plans = plans_of(data.draw(policies(name, model)), data.draw(budgets), model)
    for view, _, plan in plans or []:
        assert view.tokens <= window - 1
        assert plan.tokens <= 2 * (window - 1)
