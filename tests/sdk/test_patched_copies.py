"""Copies, threads and files of a patched model."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from tests.sdk.continuation import SMALL_TASK_KV, greedy
from tests.tiny_models import VOCABULARY, new_model
from thinkkv import sdk
from thinkkv.sdk.policies import SnapKV, StreamingLLM


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
