"""Invariant 2: logits under any budget are those of dense attention that sees only what the cache kept."""

from __future__ import annotations

import pytest
import torch

from tests.conformance.cases import Compressed, reference_of, with_policies
from tests.conformance.closeness import RMS, assert_close, relative_rms
from tests.conformance.decoding import Conversation, joined, random_chunk, random_tokens
from tests.conformance.dense_reference import Kept
from tests.conformance.small_policies import COMPRESSING, NAMES, small_policy
from tests.tiny_models import PADDED, VARIANTS, WINDOW, Case
from thinkkv import sdk
from thinkkv.sdk.masked_reference import masked_logits

STEPS = 8
RATIOS = (0.3, 0.5, 0.8)


@pytest.mark.parametrize(("case", "policy"), with_policies(COMPRESSING, every=3), ids=str)
def test_logits_equal_masked_dense_attention(case: Case, policy: str) -> None:
    prompt = case.batch()
    following = random_tokens(len(case.lengths), STEPS)
    ratio = RATIOS[(len(policy) + case.kv_heads) % len(RATIOS)]
    with sdk.apply(case.model(), policy=small_policy(policy, case.kv_heads), ratio=ratio) as handle:
        conversation = Conversation(case.model(), handle.new_cache())
        last = conversation.feed(prompt)[:, -1:]
        compressed = Compressed.of(conversation.cache)
        found = torch.cat([last, conversation.feed_all(following)], dim=1)
    assert_within_windows(case, compressed.kept)
    expected = compressed.logits(case, joined([prompt, *following]), prompt=prompt.ids.shape[1])
    assert_close(found, expected, rms=RMS[case.dtype])


def assert_within_windows(case: Case, kept: Kept) -> None:
    """The next query, at position N, still sees everything that was kept; and each head kept something once."""
    for window, layer in zip(case.windows, kept, strict=True):
        for length, heads in zip(case.lengths, layer, strict=True):
            assert len(heads) == case.kv_heads
            for positions in heads:
                oldest = 0 if window is None else max(0, length - window + 1)
                assert positions == sorted(set(positions))
                assert oldest <= positions[0] <= positions[-1] == length - 1


@pytest.mark.parametrize("policy", COMPRESSING)
def test_the_reference_notices_one_misplaced_token(policy: str) -> None:
    """Without this, a reference that sees everything would pass where compression happens not to matter."""
    case = Case("llama", kv_heads=4)
    prompt, following = case.batch(), random_tokens(1, STEPS)
    with sdk.apply(case.model(), policy=small_policy(policy, 4), ratio=0.5) as handle:
        conversation = Conversation(case.model(), handle.new_cache())
        conversation.feed(prompt)
        kept = conversation.cache.kept_positions()
    reference, whole = reference_of(case.variant, 4, case.dtype), joined([prompt, *following])
    right = reference.logits(whole, kept, prompt=63)
    assert relative_rms(reference.logits(whole, None, prompt=63), right) > 0.3
    head = next(head for head in kept[1][0] if len(head) < 63)
    del head[len(head) // 2]
    assert relative_rms(reference.logits(whole, kept, prompt=63), right) > 100 * RMS[torch.float32]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_of_the_sdk_agrees_with_this_one(variant: str) -> None:
    case = Case(variant, kv_heads=2, lengths=PADDED)
    prompt = case.batch()
    with sdk.apply(case.model(), policy=small_policy("adakv", 2), ratio=0.5) as handle:
        conversation = Conversation(case.model(), handle.new_cache())
        conversation.feed(prompt)
        kept = conversation.cache.kept_positions()
    whole = joined([prompt, *random_tokens(3, STEPS), random_chunk((5, 2, 0), seed=1)])
    columns = prompt.ids.shape[1]
    product = masked_logits(case.model(), whole.ids, kept, prompt=columns, real=whole.mask.bool())
    mine = reference_of(variant, 2, case.dtype).logits(whole, kept, prompt=columns)
    real = whole.mask[:, columns - 1 :].bool()
    assert_close(product[real], mine[real], rms=RMS[torch.float32])


@pytest.mark.parametrize("variant", ["qwen2", "qwen3-mixed", "mistral-window"])
@pytest.mark.parametrize("policy", NAMES)
def test_long_decoding_grows_and_slides(variant: str, policy: str) -> None:
    """The arenas grow twice and sliding windows drop what they passed several times."""
    case = Case(variant, kv_heads=2, lengths=(50, WINDOW - 1))
    prompt = case.batch()
    following = [
        *random_tokens(2, 150),
        random_chunk((40, 40), seed=1),
        *random_tokens(2, 110, seed=2),
        random_chunk((33, 33), seed=3),
        *random_tokens(2, 2, seed=4),
    ]
    with sdk.apply(case.model(), policy=small_policy(policy, 2), ratio=0.5) as handle:
        conversation = Conversation(case.model(), handle.new_cache())
        last = conversation.feed(prompt)[:, -1:]
        compressed = Compressed.of(conversation.cache)
        found = torch.cat([last, conversation.feed_all(following)], dim=1)
    expected = compressed.logits(case, joined([prompt, *following]), prompt=50)
    assert_close(found, expected, rms=RMS[case.dtype])
    assert_close(found[:, -35:], expected[:, -35:], rms=RMS[case.dtype])


@pytest.mark.parametrize("variant", ["qwen2-mixed", "qwen3-mixed", "mistral-window"])
@pytest.mark.parametrize("policy", ["full", "task-kv", "snapkv"])
@pytest.mark.parametrize("length", [WINDOW - 3, WINDOW - 1, WINDOW, WINDOW + 1])
def test_decoding_across_the_edge_of_the_window(variant: str, policy: str, length: int) -> None:
    case = Case(variant, kv_heads=2, lengths=(length,))
    prompt, following = case.batch(), random_tokens(1, STEPS)
    with sdk.apply(case.model(), policy=small_policy(policy, 2), ratio=0.6) as handle:
        conversation = Conversation(case.model(), handle.new_cache())
        last = conversation.feed(prompt)[:, -1:]
        kept = conversation.cache.kept_positions()
        found = torch.cat([last, conversation.feed_all(following)], dim=1)
    assert_within_windows(case, kept)
    expected = reference_of(variant, 2, case.dtype).logits(joined([prompt, *following]), kept, prompt=length)
    assert_close(found, expected, rms=RMS[case.dtype])
