"""Applying and reverting a patch, and what is left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.sdk.continuation import greedy
from thinkkv import sdk
from thinkkv.sdk.policies import TaskKV


class TestState:
    """Applying twice, reverting twice, and what is left behind."""

    def test_applying_twice_is_refused_and_the_first_patch_stays(self, model: Any, ids: torch.Tensor) -> None:
        handle = sdk.apply(model, policy="snapkv", ratio=0.5)
        with pytest.raises(sdk.PatchStateError, match=r"patched with snapkv already - revert\(\)"):
            sdk.apply(model, policy="full")
        expected = greedy(model, ids)
        assert handle.active
        assert handle.report().policy == "snapkv"
        handle.revert()
        sdk.apply(model, policy="snapkv", ratio=0.5)
        assert greedy(model, ids) == expected

    def test_reverting_twice_is_harmless_even_under_another_patch(self, model: Any, ids: torch.Tensor) -> None:
        first = sdk.apply(model, policy="full")
        first.revert()
        first.revert()
        second = sdk.apply(model, policy="full")
        first.revert()
        greedy(model, ids)
        assert second.active
        assert second.report().tokens_seen == 97

    def test_reverting_leaves_nothing_behind(self, model: Any, ids: torch.Tensor) -> None:
        stock, attributes = greedy(model, ids), set(model.__dict__)
        config, hooks = copy.deepcopy(model.config), len(model.base_model._forward_pre_hooks)
        sdk.apply(model, policy="streaming-llm", ratio=0.2).revert()
        assert set(model.__dict__) == attributes
        assert model.config.to_dict() == config.to_dict()
        assert model.config._attn_implementation == config._attn_implementation
        assert len(model.base_model._forward_pre_hooks) == hooks
        assert greedy(model, ids) == stock

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_reverting_restores_the_attention_that_was_set(self, model: Any, implementation: str) -> None:
        model.set_attn_implementation(implementation)
        with sdk.apply(model):
            assert model.config._attn_implementation != implementation
        assert model.config._attn_implementation == implementation

    def test_context_manager_reverts_after_an_error(self, model: Any, ids: torch.Tensor) -> None:
        with pytest.raises(ZeroDivisionError), sdk.apply(model) as handle:
            raise ZeroDivisionError
        assert not handle.active
        assert isinstance(model(ids).past_key_values, DynamicCache)

    def test_a_generate_of_the_users_own_comes_back(self, model: Any, ids: torch.Tensor) -> None:
        calls = []

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(kwargs)
            return type(model).generate(model, *args, **kwargs)

        model.generate = counted
        with sdk.apply(model, policy="full") as handle:
            greedy(model, ids)
            assert handle.report().tokens_seen == 97
        assert model.generate is counted
        assert len(calls) == 1

    @pytest.mark.parametrize(
        ("options", "explanation"),
        [
            ({"ratio": 0}, "ratio 0 is no share"),
            ({"ratio": 3}, "ratio 3 is no share"),
            ({"budget": 0}, "budget of 0 tokens"),
            ({"ratio": 0.5, "budget": 100}, "both ratio 0.5 and budget 100"),
            ({"policy": "h2o"}, "no policy 'h2o'"),
        ],
        ids=str,
    )
    def test_an_impossible_request_leaves_the_model_unpatched(
        self, model: Any, ids: torch.Tensor, options: dict[str, Any], explanation: str
    ) -> None:
        with pytest.raises(sdk.BudgetError, match=explanation):
            sdk.apply(model, **options)
        assert "generate" not in model.__dict__
        assert isinstance(model(ids).past_key_values, DynamicCache)

    def test_a_prompt_too_long_for_the_budget_names_the_smallest(self, model: Any, ids: torch.Tensor) -> None:
        refused = pytest.raises(sdk.BudgetError, match=r"--ratio 0\.37 or more")
        with sdk.apply(model, policy="snapkv", ratio=0.1), refused:
            greedy(model, ids)

    def test_defaults_are_task_kv_at_ratio_0_4(self, model: Any) -> None:
        with sdk.apply(model) as handle:
            assert (handle.policy, handle.budget.ratio) == (TaskKV(), 0.4)

    def test_full_ignores_a_ratio(self, model: Any) -> None:
        with sdk.apply(model, policy="full", ratio=0.1) as handle:
            assert handle.budget.ratio == 1

    def test_models_that_share_a_config_are_told_apart_or_refused(self, model: Any) -> None:
        twin = type(model)(model.config)
        with sdk.apply(model), pytest.raises(sdk.PatchStateError, match="config"):
            sdk.apply(twin)
        assert model.config._attn_implementation == "sdpa"
