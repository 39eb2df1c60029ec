"""A patched model in training, also wrapped by PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from tests.sdk.continuation import SMALL_TASK_KV, greedy
from tests.tiny_models import new_model, prompts
from thinkkv import sdk


class TestTraining:
    """A patched model in training mode trains as it always did."""

    def train_step(self, model: Any, **inputs: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        model.zero_grad()
        out = model(**inputs)
        out.loss.backward()
        return out, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    @pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen3-mixed"])
    @pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
    def test_loss_and_gradients_are_identical(self, variant: str, kind: str) -> None:
        model = new_model(variant, 2).train()
        batch = prompts([50, 50] if kind == "plain" else [50, 31])
        inputs: dict[str, Any] = {"input_ids": batch.ids, "labels": batch.ids}
        if kind == "padded":
            inputs |= {"attention_mask": batch.mask}
        if kind == "packed":
            position_ids = torch.cat([torch.arange(20), torch.arange(30)])[None].expand(2, -1)
            inputs |= {"position_ids": position_ids, "use_cache": False}
        stock, gradients = self.train_step(model, **inputs)
        with sdk.apply(model, ratio=0.1):
            found, patched_gradients = self.train_step(model, **inputs)
        assert torch.equal(found.loss, stock.loss)
        assert torch.equal(found.logits, stock.logits)
        for name, gradient in gradients.items():
            assert torch.equal(patched_gradients[name], gradient), name

    def test_packed_sequences_do_not_see_each_other(self, model: Any, ids: torch.Tensor) -> None:
        model.train()
        position_ids = torch.cat([torch.arange(40), torch.arange(50)])[None]
        with sdk.apply(model), torch.no_grad():
            packed = model(ids, position_ids=position_ids, use_cache=False).logits[:, 40:]
            alone = model(ids[:, 40:], use_cache=False).logits
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)

    def test_no_cache_of_ours_is_made(self, model: Any, ids: torch.Tensor) -> None:
        model.train()
        with sdk.apply(model) as handle:
            assert not isinstance(model(ids).past_key_values, sdk.HeterogeneousCache)
            with pytest.raises(sdk.PatchStateError):
                handle.report()

    def test_gradient_checkpointing_works(self, model: Any, ids: torch.Tensor) -> None:
        model.train()
        _, expected = self.train_step(model, input_ids=ids, labels=ids)
        model.gradient_checkpointing_enable()
        with sdk.apply(model):
            _, found = self.train_step(model, input_ids=ids, labels=ids)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)

    def test_rollouts_in_training_mode_are_compressed(self, model: Any, ids: torch.Tensor) -> None:
        with sdk.apply(model, policy=SMALL_TASK_KV, ratio=0.75) as handle:
            expected = greedy(model, ids)
            model.train()
            assert greedy(model, ids) == expected
            assert handle.report().bytes.used < 0.8 * handle.report().bytes.full


class TestPeft:
    """Models wrapped by PEFT."""

    def wrapped(self) -> Any:
        peft_model = get_peft_model(
            new_model("qwen2", 2), LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], r=4)
        )
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:  # starts at zero: an adapter that does nothing would prove nothing
                torch.nn.init.normal_(parameter, std=0.1)
        return peft_model.eval()

    def test_generate_and_forward_equal_stock_at_full_budget(self, ids: torch.Tensor) -> None:
        model = self.wrapped()
        stock, stock_logits = greedy(model, ids), model(ids).logits
        with sdk.apply(model, policy="full") as handle:
            assert greedy(model, ids) == stock
            assert handle.report().tokens_seen == 97
            out = model(input_ids=ids)
            assert isinstance(out.past_key_values, sdk.HeterogeneousCache)
            torch.testing.assert_close(out.logits, stock_logits, rtol=1e-4, atol=1e-4)
        assert isinstance(model(ids).past_key_values, DynamicCache)

    def test_compressed_tokens_equal_the_merged_models(self, ids: torch.Tensor) -> None:
        model = self.wrapped()
        with sdk.apply(model, policy=SMALL_TASK_KV, ratio=0.75):
            found = greedy(model, ids)
        merged = model.merge_and_unload()
        with sdk.apply(merged, policy=SMALL_TASK_KV, ratio=0.75):
            assert greedy(merged, ids) == found

    def test_a_patched_model_can_be_wrapped_afterwards(self, ids: torch.Tensor) -> None:
        base = new_model("qwen2", 2)
        with sdk.apply(base, policy=SMALL_TASK_KV, ratio=0.75) as handle:
            expected = greedy(base, ids)
            model = get_peft_model(base, LoraConfig(target_modules=["q_proj"])).eval()
            assert greedy(model, ids) == expected
            assert handle.report().tokens_seen == 97

    def test_beam_search_is_refused_through_the_wrapper(self, ids: torch.Tensor) -> None:
        model = self.wrapped()
        with sdk.apply(model), pytest.raises(sdk.UnsupportedGenerationError, match="num_beams=2"):
            model.generate(input_ids=ids, num_beams=2)

    def test_adapter_gradients_are_identical(self, ids: torch.Tensor) -> None:
        model = self.wrapped().train()

        def gradients() -> dict[str, torch.Tensor]:
            model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

        stock = gradients()
        with sdk.apply(model):
            patched = gradients()
        assert patched.keys() == stock.keys()
        assert all("lora" in name for name in stock)
        assert all(torch.equal(patched[name], gradient) for name, gradient in stock.items())
