"""Invariants 2 and 3 of a cache of small integers: logits of dense attention to rounded states, and promised bytes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.conformance.cases import Compressed, stored_reference_of
from tests.conformance.closeness import assert_close, relative_rms
from tests.conformance.decoding import Conversation, joined, random_chunk, random_tokens
from tests.conformance.small_policies import ALWAYS_KEPT, NAMES, small_policy
from tests.tiny_models import HEAD_DIM, KV_HEADS, VARIANTS, Case
from thinkkv import sdk
from thinkkv.patches.errors import BudgetError
from thinkkv.sdk.policies import CacheDtype, Policy

BACKENDS = ["native", "torch", "reference", "triton"]
ROUNDING = {"int8": 2e-3, "k8v5": 5e-3, "k8v4": 1e-2}
"""Allowed error of float32 logits: one number that falls on the other side of a half moves them by so much at most."""
ENTRY = {"int8": 2 * (HEAD_DIM + 4), "k8v5": HEAD_DIM + HEAD_DIM * 5 // 8 + 8, "k8v4": HEAD_DIM + HEAD_DIM // 2 + 8}
"""Bytes of a key and a value: their integers, and four bytes behind each."""

of_both = pytest.mark.parametrize("cache_dtype", ENTRY)


def quantized(name: str, kv_heads: int, cache_dtype: str) -> Policy:
    policy: Any = small_policy(name, kv_heads)
    return replace(policy, cache_dtype=cache_dtype)


def check(case: Case, policy: str, ratio: float, cache_dtype: str) -> None:
    """Prompt, tokens, a chunk and tokens again, against dense attention to rounded states."""
    prompt, batch = case.batch(), len(case.lengths)
    following = [*random_tokens(batch, 2), random_chunk((5, 3, 4)[:batch], seed=1), *random_tokens(batch, 2, seed=2)]
    with sdk.apply(case.model(), policy=quantized(policy, case.kv_heads, cache_dtype), ratio=ratio) as handle:
        conversation = Conversation(case.model(), handle.new_cache())
        last = conversation.feed(prompt)[:, -1:]
        compressed = Compressed.of(conversation.cache)
        found = torch.cat([last, conversation.feed_all(following)], dim=1)
    whole, columns = joined([prompt, *following]), prompt.ids.shape[1]
    real = whole.mask[:, columns - 1 :].bool()
    reference = stored_reference_of(case.variant, case.kv_heads, cache_dtype=cache_dtype)
    expected = reference.logits(whole, compressed.kept, prompt=columns, entries=compressed.entries)
    assert_close(found[real], expected[real], rms=ROUNDING[cache_dtype])
    exact = replace(compressed, entries=None).logits(case, whole, prompt=columns)
    assert relative_rms(found[real], exact[real]) > 2 * relative_rms(found[real], expected[real])


@of_both
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", ["full", "task-kv", "adakv"])
@pytest.mark.parametrize(
    "case",
    [Case("llama", 2), Case("qwen3", 1, lengths=(37, 21)), Case("mistral-window", 4, lengths=(45,))],
    ids=str,
)
def test_logits_with_every_backend(
    case: Case, policy: str, backend: str, cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THINKKV_KERNELS", backend)
    check(case, policy, 0.2, cache_dtype)


@of_both
@pytest.mark.parametrize("policy", NAMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_every_policy_and_family(variant: str, policy: str, cache_dtype: str) -> None:
    check(Case(variant, kv_heads=4, lengths=(63, 41, 22)), policy, 0.2, cache_dtype)


@given(
    variant=st.sampled_from(sorted(VARIANTS)),
    kv_heads=st.sampled_from(KV_HEADS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    length=st.integers(1, 90),
    policy=st.sampled_from(NAMES),
    cache_dtype=st.sampled_from(sorted(ENTRY)),
    ratio=st.integers(1, 32).map(lambda parts: parts / 32),
    new=st.integers(0, 9),
)
def test_a_ratio_is_one_of_bytes(
    variant: str,
    kv_heads: int,
    dtype: torch.dtype,
    length: int,
    policy: str,
    cache_dtype: str,
    ratio: float,
    new: int,
) -> None:
    case = Case(variant, kv_heads, dtype, (length,))
    whole, entry = 2 * HEAD_DIM * dtype.itemsize, ENTRY[cache_dtype]
    with sdk.apply(case.model(), policy=quantized(policy, kv_heads, cache_dtype), ratio=ratio) as handle:
        conversation = Conversation(case.model(), handle.new_cache())
        try:
            conversation.feed(case.batch())
        except BudgetError:
            return
        kept = conversation.cache.kept_positions()
        found = handle.report().bytes
        seen = [length if window is None else min(length, window - 1) for window in case.windows]
        compressed = [policy != "full" and tokens > ALWAYS_KEPT[policy] for tokens in seen]
        share = min(1.0, ratio * whole / entry)
        promised = [
            math.floor((share if small else 1) * n * kv_heads) for n, small in zip(seen, compressed, strict=True)
        ]
        assert found.full == whole * sum(seen) * kv_heads
        assert found.promised == entry * sum(promised)
        assert found.used == entry * sum(len(head) for layer in kept for head in layer[0]) <= found.promised
        assert found.used <= ratio * found.full or not all(compressed)
        if new:
            conversation.feed(random_chunk((new,)))
            found = handle.report().bytes
            assert found.used == found.planned
            assert sum(layer.store.arena.nbytes for layer in conversation.cache.layers) == found.physical


@of_both
@pytest.mark.parametrize("policy", ["task-kv", "rehearsed-kv"])
def test_bounded_rows_choose_among_rounded_tokens(policy: str, cache_dtype: str) -> None:
    case = Case("llama", kv_heads=4, lengths=(63, 30))
    with sdk.apply(case.model(), policy=quantized(policy, 4, cache_dtype), ratio=0.2, decode="bounded") as handle:
        conversation = Conversation(case.model(), handle.new_cache())
        for chunk in [case.batch(), *random_tokens(2, 70), random_chunk((140, 140)), *random_tokens(2, 70)]:
            assert conversation.feed(chunk).isfinite().all()
        found = handle.report().bytes
    assert found.used == found.planned <= found.promised


@of_both
def test_spare_capacity_is_never_read(cache_dtype: str) -> None:
    case = Case("qwen3-mixed", kv_heads=4, lengths=(63, 30))
    steps = [*random_tokens(2, 4), random_chunk((5, 5)), random_chunk((4, 2), seed=1), *random_tokens(2, 2, seed=2)]
    with sdk.apply(case.model(), policy=quantized("task-kv", 4, cache_dtype), ratio=0.3) as handle:
        clean, poisoned = (Conversation(case.model(), handle.new_cache()) for _ in range(2))
        for step in [case.batch(), *steps]:
            assert torch.equal(clean.feed(step), poisoned.feed(step))
            for layer in poisoned.cache.layers:
                for block in layer.store.arena.blocks:
                    for entries in (block.keys, block.values):
                        # All bytes of a float32 that overflows, or of a float16 that is none.
                        entries.view(torch.uint8)[:, block.length :] = 127 if entries.dtype == torch.int8 else 255


@of_both
def test_turns_can_be_taken_back(cache_dtype: str) -> None:
    case = Case("llama", kv_heads=2)
    with sdk.apply(case.model(), policy=quantized("snapkv", 2, cache_dtype), ratio=0.2) as handle:
        conversation = Conversation(case.model(), handle.new_cache())
        conversation.feed(case.batch())
        token = random_tokens(1, 1)[0]
        before = conversation.feed(token)
        conversation.feed(random_chunk((3,), seed=3))
        conversation.crop(4)
        assert torch.equal(conversation.feed(token), before)


def test_an_unknown_cache_dtype_is_refused() -> None:
    with pytest.raises(BudgetError, match="'int4' - choose model, int8, k8v5, k8v4"):
        sdk.apply(Case("llama", 2).model(), cache_dtype="int4")


@pytest.mark.parametrize(("cache_dtype", "head_dim", "unit"), [("k8v5", 24, 16), ("k8v4", 6, 4), ("int8", 6, 4)])
def test_heads_that_do_not_fill_their_bytes_are_refused(cache_dtype: CacheDtype, head_dim: int, unit: int) -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, head_dim=head_dim)
    model = AutoModelForCausalLM.from_config(config)
    told = f"{cache_dtype} needs head dimensions that are multiples of {unit}, this model's is {head_dim} - "
    with pytest.raises(BudgetError, match=told):
        sdk.apply(model, cache_dtype=cache_dtype)
    sdk.apply(model, cache_dtype="model").revert()
