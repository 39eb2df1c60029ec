"""Applying and reverting a patch, and everything around a model that must not notice it."""

from __future__ import annotations

import copy
import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache

from tests.tiny_models import VOCABULARY, new_model, prompts
from thinkkv import sdk
from thinkkv.sdk.policies import SnapKV, StreamingLLM, TaskKV

SMALL_TASK_KV = TaskKV(sinks=2, recent=8, observation_window=4, top=16)


def greedy(model: Any, ids: torch.Tensor, steps: int = 8, **options: Any) -> list[list[int]]:
    """New tokens of a greedy continuation."""
    return model.generate(ids, max_new_tokens=steps, do_sample=False, **options)[:, ids.shape[1] :].tolist()


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


class TestReport:
    """What a handle can tell, and when."""

    def test_nothing_cached_yet_is_said(self, model: Any) -> None:
        with sdk.apply(model) as handle, pytest.raises(sdk.PatchStateError, match="generate first"):
            handle.report()

    def test_generate_leaves_a_report_when_its_cache_is_gone(self, model: Any, ids: torch.Tensor) -> None:
        with sdk.apply(model, policy=SMALL_TASK_KV, ratio=0.75) as handle:
            greedy(model, ids)
            gc.collect()
            found = handle.report()
        per_token = 2 * 2 * 16 * 4  # K and V of two heads in float32
        assert found.tokens_seen == 97
        assert found.bytes.full == 3 * 97 * per_token
        assert found.bytes.used == found.bytes.planned <= found.bytes.promised
        assert found.bytes.promised == 3 * (90 * 0.75 + 7) * per_token
        assert [len(layer.heterogeneous) for layer in found.layers] == [1, 1, 1]
        assert handle.report() == found  # also after the revert

    def test_a_forward_calls_cache_is_reported_while_it_lives(self, model: Any, ids: torch.Tensor) -> None:
        with sdk.apply(model, policy="full") as handle:
            out = model(ids)
            assert handle.report().tokens_seen == 90
            assert handle.report(out.past_key_values) == handle.report()
            del out
            gc.collect()
            with pytest.raises(sdk.PatchStateError):
                handle.report()

    def test_each_sequence_has_its_own_classes(self, model: Any) -> None:
        with sdk.apply(model, policy=SMALL_TASK_KV, ratio=0.75) as handle:
            batch = prompts([90, 80, 70])
            model.generate(batch.ids, attention_mask=batch.mask, max_new_tokens=2, do_sample=False)
            for layer in handle.report().layers:
                assert len(layer.by_sequence) == len(layer.head_scores) == 3
                assert layer.heterogeneous == layer.by_sequence[0]


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


class TestIndependence:
    """Copies, threads and files."""

    def test_a_deep_copy_is_patched_on_its_own(self, model: Any, ids: torch.Tensor) -> None:
        stock = greedy(model, ids)
        with sdk.apply(model, policy=SMALL_TASK_KV, ratio=0.75) as handle:
            expected = greedy(model, ids)
            twin = copy.deepcopy(model)
            with torch.no_grad():  # the copy must run its own weights, not the original's
                twin.lm_head.weight.copy_(twin.lm_head.weight.roll(1, dims=0))
            rolled = [[(token + 1) % VOCABULARY for token in row] for row in expected]
            assert greedy(twin, ids, steps=1) == [row[:1] for row in rolled]
            assert greedy(model, ids) == expected
            twin_handle = twin._thinkkv_handle
            assert twin_handle is not handle
            twin_handle.revert()
            assert not twin_handle.active
            assert handle.active
            assert isinstance(twin(ids).past_key_values, DynamicCache)
            assert isinstance(model(ids).past_key_values, sdk.HeterogeneousCache)
        assert greedy(model, ids) == stock

    def test_the_original_reverts_without_its_copy(self, model: Any, ids: torch.Tensor) -> None:
        handle = sdk.apply(model, policy=SMALL_TASK_KV, ratio=0.75)
        expected = greedy(model, ids)
        twin = copy.deepcopy(model)
        handle.revert()
        assert isinstance(model(ids).past_key_values, DynamicCache)
        assert greedy(twin, ids) == expected
        assert isinstance(twin(ids).past_key_values, sdk.HeterogeneousCache)

    def test_two_models_generate_in_two_threads_as_they_do_in_turn(self, ids: torch.Tensor) -> None:
        policies = (SnapKV(observation_window=4), StreamingLLM(sinks=4))
        models = [new_model("llama", 2), new_model("qwen3", 4)]
        handles = [sdk.apply(one, policy=policy, ratio=0.3) for one, policy in zip(models, policies, strict=True)]
        expected = [greedy(one, ids, steps=24) for one in models]
        found: list[list[Any]] = [[], []]
        together = threading.Barrier(2)

        def work(which: int) -> None:
            for _ in range(3):
                together.wait(timeout=30)
                found[which].append(greedy(models[which], ids, steps=24))

        threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert found == [[tokens] * 3 for tokens in expected]
        assert [handle.report().policy for handle in handles] == ["snapkv", "streaming-llm"]

    def test_applying_and_reverting_in_one_thread_leaves_the_other_alone(self, ids: torch.Tensor) -> None:
        steady, busy = new_model("llama", 2), new_model("llama", 4)
        failures: list[BaseException] = []
        stop = threading.Event()

        def keep_patching() -> None:
            try:
                while not stop.wait(0.002):  # without a pause the two threads fight over the interpreter for minutes
                    sdk.apply(busy, policy="full").revert()
            except BaseException as error:
                failures.append(error)

        with sdk.apply(steady, policy=SMALL_TASK_KV, ratio=0.75):
            expected = greedy(steady, ids, steps=24)
            thread = threading.Thread(target=keep_patching)
            thread.start()
            found = [greedy(steady, ids, steps=24) for _ in range(3)]
            stop.set()
            thread.join(timeout=60)
        assert found == [expected] * 3
        assert not failures

    def test_a_patched_model_saves_a_stock_checkpoint(self, model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
        stock = greedy(model, ids)
        with sdk.apply(model, ratio=0.5):
            model.save_pretrained(tmp_path)
        assert "thinkkv" not in (tmp_path / "config.json").read_text()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.config._attn_implementation == "sdpa"
        assert greedy(loaded, ids) == stock


class TestReportAndSharing:
    def test_a_failed_generate_leaves_no_report(self, model: Any) -> None:
        with sdk.apply(model, ratio=0.01) as handle:
            with pytest.raises(sdk.BudgetError):
                model.generate(torch.randint(1, 97, (1, 300)), max_new_tokens=2)
            with pytest.raises(sdk.PatchStateError, match="generate first"):
                handle.report()

    def test_a_dead_cache_is_not_reported_as_an_older_one(self, model: Any, ids: torch.Tensor) -> None:
        with sdk.apply(model, policy="full") as handle:
            model.generate(ids, max_new_tokens=2)
            assert handle.report().tokens_seen > 0
            with torch.no_grad():
                model(ids)
            with pytest.raises(sdk.PatchStateError):
                handle.report()

    def test_models_that_share_a_config_are_told_apart_or_refused(self, model: Any) -> None:
        twin = type(model)(model.config)
        with sdk.apply(model), pytest.raises(sdk.PatchStateError, match="config"):
            sdk.apply(twin)
        assert model.config._attn_implementation == "sdpa"
