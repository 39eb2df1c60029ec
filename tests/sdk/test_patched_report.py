"""Reports of what a patched model has cached, while the cache lives and afterwards."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from tests.sdk.continuation import SMALL_TASK_KV, greedy
from tests.tiny_models import prompts
from thinkkv import sdk


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
