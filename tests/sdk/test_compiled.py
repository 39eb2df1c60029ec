"""Compiled steps give what steps give, from one graph, and leave no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.sdk.continuation import SMALL_REHEARSED_KV, SMALL_TASK_KV
from tests.tiny_models import Batch, new_model, prompts
from thinkkv import sdk
from thinkkv.kernels.arena import Arena
from thinkkv.sdk.compiled import row_product
from thinkkv.sdk.policies import AdaKV, CacheDtype, KVzip, Policy, SnapKV
from thinkkv.sdk.store import SPARE_TOKENS

STEPS = 12


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@torch.inference_mode()
def step_logits(model: Any, batch: Batch, steps: int, handle: sdk.PatchHandle, then: torch.Tensor | None = None) -> Any:
    """Logits of ``steps`` fixed tokens after a prompt; then of a chunk and as many steps again."""
    cache = handle.new_cache()
    mask = batch.mask
    model(batch.ids, attention_mask=mask, past_key_values=cache)
    fed = prompts([2 * steps] * len(batch.ids), label="fed").ids
    logits = []
    for turn in range(1 if then is None else 2):
        for step in range(steps):
            token = fed[:, turn * steps + step, None]
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            positions = mask.sum(dim=1, keepdim=True) - 1
            logits.append(model(token, attention_mask=mask, position_ids=positions, past_key_values=cache).logits)
        if then is not None and turn == 0:
            mask = torch.nn.functional.pad(mask, (0, then.shape[1]), value=1)
            model(then, attention_mask=mask, past_key_values=cache)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    "policy",
    [
        SMALL_TASK_KV,
        SnapKV(observation_window=4),
        AdaKV(observation_window=4),
        KVzip(sinks=2, recent=3, whole=26),
        SMALL_REHEARSED_KV,
        SnapKV(observation_window=4, cache_dtype="int8"),
        SnapKV(observation_window=4, cache_dtype="k8v5"),
        SnapKV(observation_window=4, cache_dtype="k8v4"),
    ],
    ids=lambda policy: f"{policy.name}-{policy.cache_dtype}",
)
@pytest.mark.parametrize("variant", ["llama", "qwen2-mixed", "qwen3", "mistral-window"])
def test_compiled_steps_equal_uncompiled_ones(variant: str, policy: Policy) -> None:
    model = new_model(variant, 2)
    batch = prompts([70, 31, 50])
    with sdk.apply(model, policy=policy, ratio=0.4) as handle:
        expected = step_logits(model, batch, STEPS, handle)
    with sdk.apply(model, policy=policy, ratio=0.4, compiled="eager") as handle:
        found = step_logits(model, batch, STEPS, handle)
        assert handle.report().bytes.used > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_steps_and_chunks_may_alternate(model: Any) -> None:
    batch, then = prompts([60]), prompts([9], label="then").ids
    with sdk.apply(model, policy=SMALL_TASK_KV, ratio=0.4) as handle:
        expected = step_logits(model, batch, STEPS, handle, then)
    with sdk.apply(model, policy=SMALL_TASK_KV, ratio=0.4, compiled="eager") as handle:
        found = step_logits(model, batch, STEPS, handle, then)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_one_dynamic_graph_serves_growth_and_other_prompts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounter()
    monkeypatch.setattr("thinkkv.sdk.patching.inductor", counter)
    with sdk.apply(model, policy=SMALL_TASK_KV, ratio=0.4, compiled=True) as handle:
        for length in (90, 77, 131):
            expected_growth = SPARE_TOKENS + 20
            step_logits(model, prompts([length]), expected_growth, handle)
    assert counter.frame_count == 1


def test_too_many_layouts_run_uncompiled(model: Any) -> None:
    layouts = [60], [60, 31]
    with sdk.apply(model, policy=SMALL_TASK_KV, ratio=0.4) as handle:
        expected = [step_logits(model, prompts(lengths), 3, handle) for lengths in layouts]
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        sdk.apply(model, policy=SMALL_TASK_KV, ratio=0.4, compiled="eager") as handle,
    ):
        found = [step_logits(model, prompts(layouts[0]), 3, handle)]
        with pytest.warns(UserWarning, match="too many different cache layouts"):
            found.append(step_logits(model, prompts(layouts[1]), 3, handle))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_generate_is_unchanged(model: Any, ids: torch.Tensor) -> None:
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
    with sdk.apply(model, policy=SMALL_TASK_KV, ratio=0.4):
        expected = model.generate(ids, **options)
    with sdk.apply(model, policy=SMALL_TASK_KV, ratio=0.4, compiled="eager"):
        assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "allowed"),
    [
        (torch.float32, "model", 1e-5),
        (torch.bfloat16, "model", 2e-2),
        (torch.float32, "int8", 1e-5),
        (torch.float32, "k8v5", 5e-3),
        (torch.float32, "k8v4", 1e-2),  # some numbers fall on the other side of a half
    ],
    ids=str,
)
def test_inductor_gives_the_same_logits(dtype: torch.dtype, cache_dtype: CacheDtype, allowed: float) -> None:
    model = new_model("llama", 2).to(dtype)
    batch, options = prompts([60]), {"policy": SMALL_TASK_KV, "ratio": 0.4, "cache_dtype": cache_dtype}
    with sdk.apply(model, **options) as handle:
        expected = step_logits(model, batch, STEPS, handle)
    with sdk.apply(model, **options, compiled=True) as handle:
        found = step_logits(model, batch, STEPS, handle)
    error = (found - expected).double().norm() / expected.double().norm()
    assert error < allowed


def test_memory_without_tokens_is_not_attended_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the allocator hands out may be NaN."""
    build: Callable[..., None] = Arena.__init__

    def poisoned(self: Arena, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.keys.fill_(float("nan"))
        self.values.fill_(float("nan"))

    monkeypatch.setattr(Arena, "__init__", poisoned)
    model = new_model("llama", 2)
    with sdk.apply(model, policy=SMALL_TASK_KV, ratio=0.4, compiled="eager") as handle:
        assert not step_logits(model, prompts([60]), STEPS, handle).isnan().any()


def test_with_gradients_or_without_a_cache_nothing_is_compiled(model: Any, ids: torch.Tensor) -> None:
    counter = CompileCounter()
    expected = model(ids[:, :1]).logits
    with sdk.apply(model, policy="full"), torch.inference_mode():
        uncompiled = model(ids[:, :1], use_cache=False).logits
    torch.testing.assert_close(uncompiled, expected)
    with sdk.apply(model, policy="full", compiled="eager"):
        model.forward._backend = counter
        assert torch.equal(model(ids[:, :1]).logits, expected)
        with torch.inference_mode():
            assert torch.equal(model(ids[:, :1], use_cache=False).logits, uncompiled)
    assert counter.frame_count == 0


def test_revert_and_copies_leave_the_forward_alone(model: Any, ids: torch.Tensor) -> None:
    before = model.forward
    with sdk.apply(model, policy="full", compiled="eager"):
        assert model.forward != before
        model.generate(ids, max_new_tokens=4)
        twin = copy.deepcopy(model)
        assert twin.forward._model is twin
        twin.generate(ids, max_new_tokens=4)
    assert model.forward == before
    assert "forward" not in vars(model)


def test_bounded_decoding_is_refused(model: Any) -> None:
    with pytest.raises(sdk.UnsupportedGenerationError, match=r"not compiled - use decode='append'"):
        sdk.apply(model, decode="bounded", compiled=True)


def test_row_product_by_hand() -> None:
    row, matrix = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0, 5.0], [6.0, 7.0, 8.0]])
    assert row_product(row, matrix).tolist() == [[15.0, 18.0, 21.0]]
