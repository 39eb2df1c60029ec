"""The promise: what a budget may be, how it falls to layers, and the smallest that is accepted."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from thinkkv import sdk
from thinkkv.patches.architecture import LayerShape
from thinkkv.sdk.budget import Budget, LayerBudget, LayerPrompt, check_smallest, even_layers, everything
from thinkkv.sdk.compression import Compression
from thinkkv.sdk.policies import SnapKV, TaskKV


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.0001, 3.0, float("nan"), float("inf")])
def test_a_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(sdk.BudgetError, match=re.escape(f"ratio {ratio:g} is no share")):
        Budget(ratio=ratio)


@pytest.mark.parametrize("tokens", [0, -5])
def test_a_budget_of_no_tokens_is_refused(tokens: int) -> None:
    with pytest.raises(sdk.BudgetError, match="holds nothing"):
        Budget(tokens=tokens)


@pytest.mark.parametrize("both", [{}, {"ratio": 0.5, "tokens": 100}], ids=["neither", "both"])
def test_exactly_one_kind_of_budget_is_given(both: dict[str, float]) -> None:
    with pytest.raises(sdk.BudgetError, match="either a ratio or a number of tokens"):
        Budget(**both)  # type: ignore[arg-type]


@settings(deadline=None)
@given(tokens=st.integers(1, 100_000), kv_heads=st.integers(1, 64), ratio=st.floats(0.001, 1.0))
def test_an_even_layer_gets_its_ratio_in_whole_tokens(tokens: int, kv_heads: int, ratio: float) -> None:
    (share,) = even_layers([LayerPrompt(0, kv_heads, tokens)], Budget(ratio=ratio))
    exact = Fraction(ratio) * kv_heads * tokens
    rounding = exact / 10**12  # of floating-point products
    assert exact - 1 - rounding < share.tokens <= exact + rounding


def test_a_budget_in_tokens_is_an_average_per_head_and_no_more_than_there_is() -> None:
    prompts = [LayerPrompt(0, 4, 1000), LayerPrompt(1, 2, 60)]
    assert even_layers(prompts, Budget(tokens=100)) == [LayerBudget(400), LayerBudget(120)]
    assert everything(prompts) == [LayerBudget(4000), LayerBudget(120)]


@settings(deadline=None, max_examples=300)
@given(tokens=st.integers(49, 20_000), ratio=st.floats(0.001, 1.0), smallest=st.integers(1, 48))
@example(tokens=100, ratio=0.001, smallest=29)  # 0.29 * 100 is 28.999999999999996 in floating point
def test_the_smallest_ratio_that_is_named_is_accepted(tokens: int, ratio: float, smallest: int) -> None:
    prompts = [LayerPrompt(0, 3, tokens)]
    try:
        check_smallest("task-kv", prompts, Budget(ratio=ratio), smallest)
    except sdk.BudgetError as error:
        named = float(str(error).split("--ratio ")[1].split(" ")[0])
        assert ratio < named <= 1
        check_smallest("task-kv", prompts, Budget(ratio=named), smallest)
        assert named == 0.01 or math.floor((named - 0.02) * tokens) < smallest
    else:
        assert ratio * tokens >= smallest


def test_the_smallest_budget_in_tokens_is_named() -> None:
    prompts = [LayerPrompt(0, 3, 1000)]
    with pytest.raises(sdk.BudgetError, match=r"budget of 47 tokens .* task-kv .* --budget 48 or more"):
        check_smallest("task-kv", prompts, Budget(tokens=47), 48)
    check_smallest("task-kv", prompts, Budget(tokens=48), 48)


def test_the_layer_that_sees_least_decides() -> None:
    prompts = [LayerPrompt(0, 2, 10_000), LayerPrompt(1, 2, 100)]
    with pytest.raises(sdk.BudgetError, match=r"ratio 0\.3 of 100 tokens leaves 30 per head"):
        check_smallest("snapkv", prompts, Budget(ratio=0.3), 33)


class TestCompression:
    """Short layers are whole, the others share the budget."""

    SHAPES = (LayerShape(8, 4, 16, None), LayerShape(8, 4, 16, 100))

    def test_a_layer_no_longer_than_what_is_always_kept_is_whole(self) -> None:
        compression = Compression(TaskKV(), Budget(ratio=0.5), self.SHAPES)
        assert compression.allocate(1000) == (LayerBudget(2000), LayerBudget(4 * 99))
        assert compression.promised_tokens(1000) == (2000, 4 * 99)

    def test_a_prompt_of_sinks_and_recent_is_whole(self) -> None:
        compression = Compression(TaskKV(), Budget(ratio=0.01), self.SHAPES)
        assert compression.allocate(272) == (LayerBudget(4 * 272), LayerBudget(4 * 99))
        with pytest.raises(sdk.BudgetError):
            compression.allocate(273)

    @settings(deadline=None)
    @given(tokens=st.integers(0, 5000), ratio=st.floats(0.05, 1.0))
    def test_the_sum_of_layer_budgets_is_the_promise(self, tokens: int, ratio: float) -> None:
        compression = Compression(SnapKV(observation_window=2), Budget(ratio=ratio), self.SHAPES)
        try:
            shares = compression.allocate(tokens)
        except sdk.BudgetError:
            return
        assert tuple(share.tokens for share in shares) == compression.promised_tokens(tokens)
