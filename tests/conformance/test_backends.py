"""Invariant 2 again, with every implementation of the kernels: small shapes, as Triton is interpreted without a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.conformance.cases import reference_of
from tests.conformance.closeness import RMS, assert_close
from tests.conformance.decoding import Conversation, joined, random_chunk, random_tokens
from tests.conformance.small_policies import small_policy
from tests.tiny_models import Case
from thinkkv import sdk

CASES = [
    Case("llama", kv_heads=2, lengths=(63,)),
    Case("qwen2", kv_heads=8, lengths=(40,)),
    Case("qwen3", kv_heads=1, lengths=(37, 21)),
    Case("mistral-window", kv_heads=4, lengths=(45,)),
    Case("llama3", kv_heads=2, dtype=torch.bfloat16, lengths=(50,)),
]
BACKENDS = ["torch", "reference", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", ["full", "task-kv", "adakv"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_equal_masked_dense_attention(
    case: Case, policy: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THINKKV_KERNELS", backend)
    prompt = case.batch()
    batch = len(case.lengths)
    chunk = random_chunk((5, 3)[:batch], seed=1)
    following = [*random_tokens(batch, 2), chunk, *random_tokens(batch, 2, seed=2)]
    with sdk.apply(case.model(), policy=small_policy(policy, case.kv_heads), ratio=0.5) as handle:
        conversation = Conversation(case.model(), handle.new_cache())
        last = conversation.feed(prompt)[:, -1:]
        kept = conversation.cache.kept_positions()
        found = torch.cat([last, conversation.feed_all(following)], dim=1)
    reference = reference_of(case.variant, case.kv_heads, case.dtype)
    whole = joined([prompt, *following])
    expected = reference.logits(whole, kept, prompt=prompt.ids.shape[1])
    real = whole.mask[:, prompt.ids.shape[1] - 1 :].bool()
    assert_close(found[real], expected[real], rms=RMS[case.dtype])
