"""Direct forward calls of a patched model, and what may be done with the cache that they return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.sdk.continuation import SMALL_TASK_KV, greedy
from tests.tiny_models import new_model, prompts
from thinkkv import sdk


class TestForward:
    """``model(...)`` called directly."""

    def test_it_returns_a_heterogeneous_cache(self, model: Any, ids: torch.Tensor) -> None:
        with torch.inference_mode(), sdk.apply(model, policy="full"):
            stock_last = model(ids, use_cache=False).logits[:, -1]
            out = model(ids)
            assert isinstance(out.past_key_values, sdk.HeterogeneousCache)
            torch.testing.assert_close(out.logits[:, -1], stock_last, rtol=1e-4, atol=1e-4)
            step = model(ids[:, :1], past_key_values=out.past_key_values)
            assert step.past_key_values is out.past_key_values
            assert out.past_key_values.get_seq_length() == 91

    def test_the_decoder_alone_takes_its_arguments_by_position(self, model: Any, ids: torch.Tensor) -> None:
        expected = model.model(ids, None, None, None)
        with sdk.apply(model, policy="full"):
            found = model.model(ids, None, None, None)
        assert isinstance(found.past_key_values, sdk.HeterogeneousCache)
        torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-4)

    def test_without_a_cache_it_is_stock(self, model: Any) -> None:
        batch = prompts([60, 33])
        stock = model(batch.ids, attention_mask=batch.mask, use_cache=False)
        with sdk.apply(model, ratio=0.1):
            found = model(batch.ids, attention_mask=batch.mask, use_cache=False)
        assert found.past_key_values is None
        assert torch.equal(found.logits, stock.logits)

    @pytest.mark.parametrize("padding", ["left", "right", "holes"])
    def test_logits_of_real_tokens_do_not_depend_on_where_the_padding_is(self, model: Any, padding: str) -> None:
        ids = prompts([60, 60]).ids
        mask = torch.ones_like(ids)
        mask[1, {"left": slice(0, 20), "right": slice(40, 60), "holes": slice(20, 50, 2)}[padding]] = 0
        stock = model(ids, attention_mask=mask).logits[mask.bool()]
        with sdk.apply(model, policy="full"):
            found = model(ids, attention_mask=mask).logits[mask.bool()]
        torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-4)

    def test_gradients_through_our_cache_are_stock(self, model: Any, ids: torch.Tensor) -> None:
        model(ids, labels=ids).loss.backward()
        stock = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        with sdk.apply(model, policy="snapkv", ratio=0.5) as handle:
            out = model(ids, labels=ids)
            out.loss.backward()
            assert handle.report(out.past_key_values).bytes.used < 0.6 * handle.report().bytes.full
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, stock[name], rtol=1e-4, atol=1e-5, msg=name)

    @pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen3-mixed"])
    def test_a_cache_of_the_users_own_works_like_stock(self, variant: str, ids: torch.Tensor) -> None:
        model = new_model(variant, 2)
        stock = greedy(model, ids, past_key_values=DynamicCache(config=model.config))
        cache = DynamicCache(config=model.config)
        with sdk.apply(model, ratio=0.1) as handle:
            assert greedy(model, ids, past_key_values=cache) == stock
            with pytest.raises(sdk.PatchStateError):
                handle.report()
        assert cache.get_seq_length() == 97

    def test_a_prepared_4d_mask_is_refused(self, model: Any, ids: torch.Tensor) -> None:
        mask = torch.ones(1, 1, 90, 90, dtype=torch.bool).tril()
        with sdk.apply(model), pytest.raises(sdk.UnsupportedGenerationError, match="4-D attention mask"):
            model(ids, attention_mask=mask)

    def test_a_prepared_4d_mask_without_a_cache_is_stock(self, model: Any, ids: torch.Tensor) -> None:
        mask = torch.ones(1, 1, 90, 90, dtype=torch.bool).tril()
        stock = model(ids, attention_mask=mask, use_cache=False).logits
        with sdk.apply(model):
            assert torch.equal(model(ids, attention_mask=mask, use_cache=False).logits, stock)

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_a_thinkkv_cache_under_another_attention_fails_loudly(
        self, model: Any, ids: torch.Tensor, implementation: str
    ) -> None:
        with sdk.apply(model, policy="full") as handle:
            cache = model(ids).past_key_values
            model.set_attn_implementation(implementation)
            with pytest.raises(sdk.UnsupportedGenerationError, match="do not change the attention implementation"):
                model(ids[:, :1], past_key_values=cache)
            with pytest.raises(sdk.UnsupportedGenerationError):
                greedy(model, ids)
            handle.revert()
            with pytest.raises(sdk.UnsupportedGenerationError):
                model(ids[:, :1], past_key_values=cache)

    @pytest.mark.parametrize(
        ("first", "then"),
        [
            (torch.inference_mode, torch.no_grad),
            (torch.inference_mode, torch.enable_grad),
            (torch.no_grad, torch.inference_mode),
            (torch.enable_grad, torch.inference_mode),
        ],
        ids=["inference-no_grad", "inference-grad", "no_grad-inference", "grad-inference"],
    )
    @pytest.mark.parametrize("variant", ["llama", "mistral-window"])
    def test_a_cache_crosses_the_border_of_inference_mode(
        self, variant: str, ids: torch.Tensor, first: Any, then: Any
    ) -> None:
        model, grows = new_model(variant, 2), prompts([300]).ids

        def turns(first: Any, then: Any) -> list[torch.Tensor]:
            with first():
                cache = model(ids).past_key_values
                early = model(ids[:, :1], past_key_values=cache).logits
                late = model(grows, past_key_values=cache).logits
            with then():
                short = model(ids[:, :1], past_key_values=cache).logits
                return [early, late, short, model(grows, past_key_values=cache).logits]

        with sdk.apply(model, policy=SMALL_TASK_KV, ratio=0.9):
            expected = turns(torch.no_grad, torch.no_grad)
            found = turns(first, then)
        # Where a gradient is wanted another kernel attends, so the last bits may differ.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class TestCrop:
    """Forgetting generated tokens, never evicted ones."""

    def test_appended_tokens_can_be_forgotten(self, model: Any, ids: torch.Tensor) -> None:
        with torch.inference_mode(), sdk.apply(model, policy="snapkv", ratio=0.5):
            cache = model(ids).past_key_values
            expected = model(ids[:, :4], past_key_values=cache).logits
            cache.crop(-4)
            assert cache.get_seq_length() == 90
            assert torch.equal(model(ids[:, :4], past_key_values=cache).logits, expected)

    def test_a_crop_into_the_prompt_is_refused_and_changes_nothing(self, model: Any, ids: torch.Tensor) -> None:
        with torch.inference_mode(), sdk.apply(model, policy="snapkv", ratio=0.5):
            cache = model(ids).past_key_values
            model(ids[:, :2], past_key_values=cache)
            held = cache.kept_positions()
            with pytest.raises(sdk.UnsupportedGenerationError, match="only the last 2 can be forgotten"):
                cache.crop(-3)
            assert (cache.kept_positions(), cache.get_seq_length()) == (held, 92)

    @pytest.mark.parametrize(
        ("method", "argument"),
        [
            ("reorder_cache", torch.tensor([0])),
            ("batch_repeat_interleave", 2),
            ("batch_select_indices", torch.tensor([0])),
        ],
        ids=lambda value: str(value),
    )
    def test_what_beams_need_is_refused(self, model: Any, ids: torch.Tensor, method: str, argument: Any) -> None:
        with sdk.apply(model, policy="full"):
            cache = model(ids).past_key_values
        with pytest.raises(sdk.UnsupportedGenerationError, match="does not support"):
            getattr(cache, method)(argument)
