"""Task-KV equation by equation (arXiv:2501.15113), with numbers computed by hand and the paper's own settings."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from thinkkv.sdk.budget import LayerBudget
from thinkkv.sdk.plan import PromptView
from thinkkv.sdk.policies.sinks_middle_recent import Split
from thinkkv.sdk.policies.task_kv import TaskKV, choose_heads
from thinkkv.sdk.separator import head_distances


def random_prompt(
    tokens: int, kv_heads: int, group: int = 1, *, layer: int = 0, layers: int = 1, seed: int = 0
) -> PromptView:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, kv_heads, tokens, 8, generator=generator)
    queries = torch.randn(kv_heads * group, tokens, 8, generator=generator)
    return PromptView(layer, layers, queries, keys, values, scale=8**-0.5)


def flat_prompt(tokens: int, kv_heads: int, query_heads: int, *, layer: int = 0, layers: int = 32) -> PromptView:
    """A prompt whose contents do not matter, only its counts; no memory is spent on it."""
    queries = torch.zeros(1, 1, 1).expand(query_heads, tokens, 1)
    keys = torch.zeros(1, 1, 1).expand(kv_heads, tokens, 1)
    return PromptView(layer, layers, queries, keys, keys, scale=1.0)


class TestDistances:
    """Eq. 14-15 and the distance from the semantic center."""

    VALUES = torch.tensor(
        [
            [[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]],
            [[1.0, 1.0], [2.0, 0.0], [0.0, 1.0]],
            [[2.0, 1.0], [9.0, 9.0], [1.0, -1.0]],
        ]
    )
    SCORES = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6], [0.7, 0.1, 0.2]])
    # With t = 2: v' = (.5, .3), (.6, .6), (1.6, .5); their center is (.9, 7/15).
    BY_HAND = torch.tensor([math.sqrt(169) / 30, math.sqrt(97) / 30, math.sqrt(442) / 30])

    def prompt(self, values: torch.Tensor, query_heads: int) -> PromptView:
        queries = torch.zeros(query_heads, values.shape[1], values.shape[2])
        return PromptView(0, 1, queries, torch.zeros_like(values), values, scale=1.0)

    @pytest.mark.parametrize("unit", ["query", "kv"])
    @pytest.mark.parametrize("reduction", ["max", "mean"])
    def test_three_heads_by_hand(self, unit: str, reduction: str) -> None:
        # Without query groups every reading of the paper is the same.
        prompt = self.prompt(self.VALUES, query_heads=3)
        found = head_distances(prompt, self.SCORES, top=2, unit=unit, reduction=reduction)  # type: ignore[arg-type]
        torch.testing.assert_close(found, self.BY_HAND)

    def test_top_tokens_alone_count(self) -> None:
        values = self.VALUES.clone()
        values[0, 2], values[1, 0], values[2, 1] = 1e6, 1e6, 1e6  # the least attended token of each head
        found = head_distances(self.prompt(values, 3), self.SCORES, top=2)
        torch.testing.assert_close(found, self.BY_HAND)

    # Two KV heads, two query heads each, one token: vectors (1, 0), (0, 0) of head 0 and (0, 3), (0, 1) of head 1.
    GROUPED_VALUES = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    GROUPED_SCORES = torch.tensor([[1.0], [0.0], [3.0], [1.0]])

    @pytest.mark.parametrize(
        ("unit", "reduction", "expected"),
        [
            # center (1/4, 1): distances 5/4, sqrt(17)/4 | sqrt(65)/4, 1/4
            ("query", "max", [5 / 4, math.sqrt(65) / 4]),
            ("query", "mean", [(5 + math.sqrt(17)) / 8, (math.sqrt(65) + 1) / 8]),
            # group means (1/2, 0), (0, 2), center (1/4, 1): sqrt(1/16 + 1) each
            ("kv", "max", [math.sqrt(17) / 4, math.sqrt(17) / 4]),
            ("kv", "mean", [math.sqrt(17) / 4, math.sqrt(17) / 4]),
        ],
        ids=["query-max", "query-mean", "kv-max", "kv-mean"],
    )
    def test_query_groups_by_hand(self, unit: str, reduction: str, expected: list[float]) -> None:
        prompt = self.prompt(self.GROUPED_VALUES, query_heads=4)
        found = head_distances(prompt, self.GROUPED_SCORES, top=1, unit=unit, reduction=reduction)  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.tensor(expected))

    @settings(deadline=None, max_examples=25)
    @given(seed=st.integers(0, 10_000), group=st.integers(1, 4), tokens=st.integers(2, 50))
    def test_one_vector_per_kv_head_decides_nothing_between_two(self, seed: int, group: int, tokens: int) -> None:
        prompt = random_prompt(tokens, kv_heads=2, group=group, seed=seed)
        near, far = head_distances(prompt, prompt.window_scores(8), top=16, unit="kv").tolist()
        assert near == pytest.approx(far, rel=1e-4)

    def test_one_vector_per_query_head_decides_between_two(self) -> None:
        prompt = random_prompt(50, kv_heads=2, group=3)
        one, other = head_distances(prompt, prompt.window_scores(8), top=16).tolist()
        assert one != pytest.approx(other, rel=1e-3)


class TestHeterogeneousCount:
    """f(r), eq. 16."""

    def test_defaults_are_the_papers_constants(self) -> None:
        policy = TaskKV()
        assert (policy.sinks, policy.recent, policy.observation_window) == (16, 256, 32)
        assert (policy.top, policy.pooling) == (256, 7)

    @pytest.mark.parametrize("policy", [TaskKV(), TaskKV(beta=0.25, top_layer_heads=4)], ids=["default", "stated"])
    def test_llama_2_7b_has_8_at_the_bottom_and_4_on_top(self, policy: TaskKV) -> None:
        counts = [policy.heterogeneous_count(32, 32, layer, 32) for layer in range(32)]
        assert (counts[0], counts[-1]) == (8, 4)
        assert counts == [math.floor(8 - Fraction(4 * layer, 31) + Fraction(1, 2)) for layer in range(32)]

    @pytest.mark.parametrize("policy", [TaskKV(), TaskKV(beta=0.3, top_layer_heads=1)], ids=["default", "stated"])
    def test_mistral_7b_has_2_at_the_bottom_and_1_on_top(self, policy: TaskKV) -> None:
        counts = [policy.heterogeneous_count(8, 32, layer, 32) for layer in range(32)]
        bottom, top = Fraction(24, 10), 1
        assert counts == [math.floor(bottom - (bottom - top) * layer / 31 + Fraction(1, 2)) for layer in range(32)]
        assert (counts[0], counts[-1]) == (2, 1)

    def test_smollm2_135m_has_one_everywhere(self) -> None:
        assert {TaskKV().heterogeneous_count(3, 9, layer, 30) for layer in range(30)} == {1}

    @pytest.mark.parametrize(("rounding", "expected"), [("nearest", 2), ("floor", 2), ("ceil", 3)])
    def test_rounding_of_2_4_heads(self, rounding: str, expected: int) -> None:
        assert TaskKV(rounding=rounding).heterogeneous_count(8, 32, 0, 32) == expected  # type: ignore[arg-type]

    def test_half_a_head_rounds_up(self) -> None:
        assert TaskKV(beta=0.25).heterogeneous_count(10, 10, 0, 32) == 3

    @settings(deadline=None)
    @given(
        kv_heads=st.integers(1, 64),
        top=st.integers(0, 64),
        layers=st.integers(2, 80),
        percent=st.integers(0, 100),
        rounding=st.sampled_from(["nearest", "floor", "ceil"]),
    )
    def test_ends_are_n_beta_and_m_and_no_layer_is_outside(
        self, kv_heads: int, top: int, layers: int, percent: int, rounding: str
    ) -> None:
        assume(top <= kv_heads)
        policy = TaskKV(beta=percent / 100, top_layer_heads=top, rounding=rounding)  # type: ignore[arg-type]
        counts = [policy.heterogeneous_count(kv_heads, kv_heads, layer, layers) for layer in range(layers)]
        bottom = Fraction(kv_heads * (percent / 100))
        exact = {"nearest": math.floor(bottom + Fraction(1, 2)), "floor": math.floor(bottom), "ceil": math.ceil(bottom)}
        assert counts[0] == exact[rounding]
        assert counts[-1] == top
        assert counts in (sorted(counts), sorted(counts, reverse=True))

    def test_a_model_of_one_layer_has_the_bottom_layers_count(self) -> None:
        assert TaskKV().heterogeneous_count(32, 32, 0, 1) == 8


class TestSplit:
    """k, eq. 17, and the order of the fallback where it would be negative."""

    def test_mistral_at_60_percent_of_4000_tokens(self) -> None:
        # f = 2, B = .6 * 8 * 4000 = 19200; (19200 - 8000) / 6 = 1866.67, less 16 + 256.
        found = TaskKV().split(flat_prompt(4000, 8, 32), LayerBudget(19200))
        assert found == Split(full=2, sinks=16, middle=1594, recent=256)

    def test_llama_2_on_top_at_40_percent_of_4000_tokens(self) -> None:
        # f = 4 in layer 31, B = 51200; (51200 - 16000) / 28 = 1257.14, less 272.
        found = TaskKV().split(flat_prompt(4000, 32, 32, layer=31), LayerBudget(51200))
        assert found == Split(full=4, sinks=16, middle=985, recent=256)

    def test_nearest_head_on_top_of_the_count_takes_a_place_more(self) -> None:
        # f = 2 + 1; (19200 - 12000) / 5 = 1440, less 272.
        found = TaskKV(nearest="on-top").split(flat_prompt(4000, 8, 32), LayerBudget(19200))
        assert found == Split(full=3, sinks=16, middle=1168, recent=256)

    def test_negative_k_lowers_the_count_first(self) -> None:
        # 40 % of 1000: f = 2 leaves 200 tokens, k = -72; f = 1 leaves 2200 / 7 = 314.29, k = 42.
        found = TaskKV().split(flat_prompt(1000, 8, 32), LayerBudget(3200))
        assert found == Split(full=1, sinks=16, middle=42, recent=256)

    def test_then_no_head_is_full_and_the_middle_shrinks(self) -> None:
        # 35 % of 800: f = 1 leaves 1440 / 7 < 272; without full heads 280 tokens are left, k = 8.
        found = TaskKV().split(flat_prompt(800, 8, 32), LayerBudget(2240))
        assert found == Split(full=0, sinks=16, middle=8, recent=256)

    def test_at_last_the_recent_tokens_shrink(self) -> None:
        found = TaskKV().split(flat_prompt(800, 8, 32), LayerBudget(8 * 100))
        assert found == Split(full=0, sinks=16, middle=0, recent=84)

    @settings(deadline=None)
    @given(
        tokens=st.integers(273, 20_000),
        kv_heads=st.integers(1, 32),
        ratio=st.floats(0.01, 0.99),
        layer=st.integers(0, 31),
    )
    def test_budget_is_kept_and_hardly_wasted(self, tokens: int, kv_heads: int, ratio: float, layer: int) -> None:
        policy, prompt = TaskKV(), flat_prompt(tokens, kv_heads, 4 * kv_heads, layer=layer)
        budget = LayerBudget(math.floor(ratio * kv_heads * tokens))
        assume(budget.tokens >= policy.smallest * kv_heads)
        found = policy.split(prompt, budget)
        others = kv_heads - found.full
        spent = found.full * tokens + others * (found.sinks + found.middle + found.recent)
        assert budget.tokens - others < spent <= budget.tokens
        assert min(found.middle, found.full) >= 0
        assert found.recent >= policy.observation_window
        assert found.sinks == policy.sinks
        if found.full or found.middle:
            assert found.recent == policy.recent


class TestChosenHeads:
    """Farthest first, and the nearest one with them."""

    DISTANCES = torch.tensor([3.0, 1.0, 2.0, 5.0])

    @pytest.mark.parametrize(
        ("count", "nearest", "expected"),
        [
            (0, True, ()),
            (1, True, (3,)),
            (2, True, (1, 3)),
            (3, True, (0, 1, 3)),
            (4, True, (0, 1, 2, 3)),
            (1, False, (3,)),
            (2, False, (0, 3)),
            (3, False, (0, 2, 3)),
        ],
        ids=lambda value: str(value),
    )
    def test_by_hand(self, count: int, nearest: bool, expected: tuple[int, ...]) -> None:
        assert choose_heads(self.DISTANCES, count, nearest=nearest) == expected

    @pytest.mark.parametrize(
        ("nearest", "expected"), [("inside", (1, 3)), ("on-top", (0, 1, 3)), ("none", (0, 3))], ids=str
    )
    def test_plan_marks_them(self, nearest: str, expected: tuple[int, ...]) -> None:
        policy = TaskKV(
            beta=0.5,
            top_layer_heads=2,
            sinks=2,
            recent=4,
            observation_window=2,
            nearest=nearest,  # type: ignore[arg-type]
            head_scores=(tuple(self.DISTANCES.tolist()),),
        )
        prompt = random_prompt(100, kv_heads=4)
        plan = policy.plan(prompt, LayerBudget(360))
        assert plan.heterogeneous == expected
        assert [head for head in range(4) if len(plan.kept[head]) == 100] == list(expected)

    def test_a_profile_outranks_the_prompt(self) -> None:
        prompt = random_prompt(100, kv_heads=4)
        small = {"sinks": 2, "recent": 4, "observation_window": 2, "beta": 0.25}
        own = TaskKV(**small).plan(prompt, LayerBudget(200)).heterogeneous  # type: ignore[arg-type]
        for head in range(4):
            scores = (tuple(float(i == head) for i in range(4)),)
            fixed = TaskKV(**small, head_scores=scores).plan(prompt, LayerBudget(200))  # type: ignore[arg-type]
            assert fixed.heterogeneous == (head,)
            assert fixed.head_scores is not None
            assert fixed.head_scores.tolist() == list(scores[0])
        assert own == TaskKV(**small).plan(prompt, LayerBudget(200)).heterogeneous  # type: ignore[arg-type]


class TestMiddleTokens:
    """The other heads' middle: top-k pooled window scores between the sinks and the recent tokens."""

    def plan_of(self, attended: int, pooling: int, middle: int) -> list[int]:
        """What a head keeps whose last queries attend to one token, at 2 + 4 + ``middle`` tokens a head."""
        keys = torch.zeros(1, 60, 4)
        keys[0, attended, 0] = 10.0
        queries = torch.zeros(1, 60, 4)
        queries[:, :, 0] = 10.0
        prompt = PromptView(0, 1, queries, keys, torch.zeros_like(keys), scale=0.5)
        policy = TaskKV(beta=0.0, top_layer_heads=0, sinks=2, recent=4, observation_window=2, pooling=pooling)
        return policy.plan(prompt, LayerBudget(6 + middle)).kept[0].tolist()

    def test_the_attended_token_is_kept(self) -> None:
        assert self.plan_of(attended=30, pooling=1, middle=1) == [0, 1, 30, 56, 57, 58, 59]

    def test_pooling_keeps_its_neighbours_too(self) -> None:
        assert self.plan_of(attended=30, pooling=7, middle=7) == [0, 1, *range(27, 34), 56, 57, 58, 59]

    @pytest.mark.parametrize("attended", [1, 56], ids=["sink", "recent"])
    def test_tokens_kept_anyway_win_no_second_place(self, attended: int) -> None:
        kept = self.plan_of(attended=attended, pooling=1, middle=5)
        assert len(kept) == len(set(kept)) == 11

    @settings(deadline=None, max_examples=25)
    @given(seed=st.integers(0, 1000), pooling=st.sampled_from([1, 3, 7]), group=st.integers(1, 3))
    def test_middle_is_the_top_k_of_the_group_mean(self, seed: int, pooling: int, group: int) -> None:
        prompt = random_prompt(50, kv_heads=2, group=group, seed=seed)
        policy = TaskKV(beta=0.0, top_layer_heads=0, sinks=3, recent=10, observation_window=5, pooling=pooling)
        plan = policy.plan(prompt, LayerBudget(2 * 20))
        scores = prompt.window_scores(5).double().view(2, group, 50).mean(dim=1)
        for head in range(2):
            between = scores[head, 3:40].tolist()
            padded = [0.0] * (pooling // 2) + between + [0.0] * (pooling // 2)
            pooled = [sum(padded[i : i + pooling]) / pooling for i in range(len(between))]
            kept = [i - 3 for i in plan.kept[head].tolist() if 3 <= i < 40]
            left = [pooled[i] for i in range(len(between)) if i not in kept]
            assert len(kept) == 7
            assert min(pooled[i] for i in kept) >= max(left) - 1e-7
