"""Invariant 3: bytes in use follow the formula, within the promise; allocated bytes within its slack."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.conformance.cases import DTYPES
from tests.conformance.decoding import Conversation, random_chunk, random_tokens
from tests.conformance.small_policies import ALWAYS_KEPT, COMPRESSING, NAMES, SMALLEST, small_policy
from tests.tiny_models import HEAD_DIM, KV_HEADS, VARIANTS, WINDOW, Batch, Case
from thinkkv import sdk
from thinkkv.patches.errors import BudgetError

# Thirty-seconds are exact in binary: the formula below cannot differ by rounding.
ratios = st.integers(1, 32).map(lambda parts: {"ratio": parts / 32})
token_budgets = st.integers(1, 100).map(lambda tokens: {"budget": tokens})
chunks = st.lists(st.integers(1, 7), max_size=4)
cases = st.builds(
    Case,
    variant=st.sampled_from(sorted(VARIANTS)),
    kv_heads=st.sampled_from(KV_HEADS),
    dtype=st.sampled_from(DTYPES),
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=3).map(tuple),
)


def visible(window: int | None, tokens: int) -> int:
    """Tokens that the next query can see."""
    return tokens if window is None else min(tokens, window - 1)


def share(budget: dict[str, Any], tokens: int, heads: int = 1) -> int:
    """Whole tokens of a budget, summed over heads."""
    per_head = budget["ratio"] * tokens if "ratio" in budget else min(budget["budget"], tokens)
    return math.floor(per_head * heads)


def entry_bytes(case: Case) -> int:
    """A key and a value of one KV head."""
    return 2 * HEAD_DIM * case.dtype.itemsize


def promised_bytes(case: Case, policy: str, budget: dict[str, Any], appended: list[int]) -> int:
    tokens = 0
    for window in case.windows:
        for length, new in zip(case.lengths, appended, strict=True):
            seen = visible(window, length)
            whole = policy == "full" or seen <= ALWAYS_KEPT[policy]
            tokens += seen * case.kv_heads if whole else share(budget, seen, case.kv_heads)
            tokens += new * case.kv_heads
    return entry_bytes(case) * tokens


def full_bytes(case: Case, appended: list[int]) -> int:
    tokens = [
        visible(window, length + new)
        for window in case.windows
        for length, new in zip(case.lengths, appended, strict=True)
    ]
    return entry_bytes(case) * case.kv_heads * sum(tokens)


def needed_bytes(case: Case, kept_of_prompt: list[list[list[list[int]]]], appended: list[int]) -> int:
    """What was kept of the prompt and what came after it, as far as the windows still reach."""
    tokens = 0
    for window, layer in zip(case.windows, kept_of_prompt, strict=True):
        for length, new, heads in zip(case.lengths, appended, layer, strict=True):
            oldest = 0 if window is None else length + new - window + 1
            for kept in heads:
                tokens += sum(position >= oldest for position in [*kept, *range(length, length + new)])
    return entry_bytes(case) * tokens


def allocated_bytes(cache: Any) -> int:
    """Bytes of every floating-point storage that a cache keeps alive, wherever it hides."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors_within(cache, set())
        if tensor.is_floating_point()
    }
    return sum(storages.values())


def tensors_within(thing: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, (list, tuple, set)):
        for part in thing:
            yield from tensors_within(part, seen)
    elif isinstance(thing, dict):
        for part in thing.values():
            yield from tensors_within(part, seen)
    elif hasattr(thing, "__dict__"):
        yield from tensors_within(vars(thing), seen)


def assert_bytes(case: Case, policy: str, budget: dict[str, Any], found: Any, cache: Any, needed: int, new: list[int]):
    assert found.used == found.planned == needed
    assert found.promised == promised_bytes(case, policy, budget, new)
    assert found.full == full_bytes(case, new)
    assert found.used <= found.promised
    assert found.physical == allocated_bytes(cache)
    rows = len(case.windows) * len(case.lengths) * case.kv_heads
    assert found.physical <= 1.15 * found.used + 256 * rows * entry_bytes(case)


@given(case=cases, policy=st.sampled_from(NAMES), budget=ratios | token_budgets, following=chunks)
def test_bytes_follow_the_formula(case: Case, policy: str, budget: dict[str, Any], following: list[int]) -> None:
    with sdk.apply(case.model(), policy=small_policy(policy, case.kv_heads), **budget) as handle:
        conversation = Conversation(case.model(), handle.new_cache())
        try:
            conversation.feed(case.batch())
        except BudgetError:
            assert is_too_small(case, policy, budget)
            return
        assert not is_too_small(case, policy, budget)
        cache = conversation.cache
        kept = cache.kept_positions()
        new = [0] * len(case.lengths)
        assert handle.report(cache).bytes.used == entry_bytes(case) * sum(
            len(positions) for layer in kept for heads in layer for positions in heads
        )
        for i_chunk, tokens in enumerate([0, *following]):
            if tokens:
                conversation.feed(random_chunk((tokens,) * len(case.lengths), seed=i_chunk))
            new = [count + tokens for count in new]
            needed = needed_bytes(case, kept, new)
            assert_bytes(case, policy, budget, handle.report(cache).bytes, cache, needed, new)


def is_too_small(case: Case, policy: str, budget: dict[str, Any]) -> bool:
    """Whether some layer would have to compress some sequence below the policy's smallest."""
    return policy != "full" and any(
        visible(window, length) > ALWAYS_KEPT[policy] and share(budget, visible(window, length)) < SMALLEST[policy]
        for window in case.windows
        for length in case.lengths
    )


@given(
    variant=st.sampled_from(sorted(VARIANTS)),
    length=st.integers(11, 200),
    policy=st.sampled_from(COMPRESSING),
    budget=st.sampled_from([{"ratio": 1 / 128}, {"ratio": 1 / 32}, {"ratio": 1 / 16}, {"budget": 1}, {"budget": 5}]),
)
def test_a_budget_below_the_smallest_names_one_that_works(
    variant: str, length: int, policy: str, budget: dict[str, Any]
) -> None:
    case = Case(variant, kv_heads=2, lengths=(length,))
    assume(is_too_small(case, policy, budget))
    chosen = small_policy(policy, case.kv_heads)
    with (
        sdk.apply(case.model(), policy=chosen, **budget),
        pytest.raises(BudgetError, match=r"use --\w+ [\d.]+ or more") as refusal,
    ):
        Conversation(case.model()).feed(case.batch())
    option, value = re.search(r"--(\w+) ([\d.]+) or more", str(refusal.value)).groups()
    named = {option: int(value) if option == "budget" else float(value)}
    assert named.keys() == budget.keys()
    if option == "budget":
        assert named == {"budget": SMALLEST[policy]}
    else:
        assert is_too_small(case, policy, {"ratio": named["ratio"] - 0.01})
    with sdk.apply(case.model(), policy=chosen, **named):
        Conversation(case.model()).feed(case.batch())


@pytest.mark.parametrize("policy", COMPRESSING)
@pytest.mark.parametrize("variant", ["llama", "qwen2-mixed"])
def test_prompts_up_to_the_always_kept_length_stay_whole(variant: str, policy: str) -> None:
    longest = ALWAYS_KEPT[policy]
    case = Case(variant, kv_heads=2, lengths=(longest, 1, longest // 2))
    with sdk.apply(case.model(), policy=small_policy(policy, 2), ratio=0.01) as handle:
        conversation = Conversation(case.model(), handle.new_cache())
        conversation.feed(case.batch())
        found = handle.report().bytes
    for window, kept in zip(case.windows, conversation.cache.kept_positions(), strict=True):
        assert kept == [[list(range(length - visible(window, length), length))] * 2 for length in case.lengths]
    assert found.used == found.promised == found.full


@pytest.mark.parametrize("policy", NAMES)
@pytest.mark.parametrize("variant", ["qwen3", "mistral-window"])
def test_slack_holds_over_a_long_generation_and_long_chunks(variant: str, policy: str) -> None:
    case = Case(variant, kv_heads=2, lengths=(80, WINDOW - 1))
    budget = {"ratio": 0.5}
    with sdk.apply(case.model(), policy=small_policy(policy, 2), **budget) as handle:
        conversation = Conversation(case.model(), handle.new_cache())
        conversation.feed(case.batch())
        kept, new = conversation.cache.kept_positions(), [0, 0]
        for chunk in [*random_tokens(2, 140), random_chunk((150, 150)), random_chunk((700, 700)), *random_tokens(2, 3)]:
            conversation.feed(chunk)
            new = [count + chunk.ids.shape[1] for count in new]
            found = handle.report(conversation.cache).bytes
            assert_bytes(case, policy, budget, found, conversation.cache, needed_bytes(case, kept, new), new)


@pytest.mark.parametrize("policy", NAMES)
@pytest.mark.parametrize("variant", ["llama", "qwen3-mixed"])
def test_spare_capacity_is_never_read(variant: str, policy: str) -> None:
    case = Case(variant, kv_heads=4, lengths=(63, 30))
    steps = [*random_tokens(2, 4), random_chunk((5, 5)), random_chunk((4, 2), seed=1), *random_tokens(2, 2, seed=2)]
    with sdk.apply(case.model(), policy=small_policy(policy, 4), ratio=0.5) as handle:
        clean = Conversation(case.model(), handle.new_cache())
        poisoned = Conversation(case.model(), handle.new_cache())
        for step in [case.batch(), *steps]:
            expected, found = clean.feed(step), poisoned.feed(step)
            assert torch.equal(found, expected)
            assert not found.isnan().any()
            assert poison(poisoned.cache) > 0


def poison(cache: Any) -> int:
    """Fill what no row uses with NaN; returns how many entries that were."""
    filled = 0
    for layer in cache.layers:
        for block in layer.store.arena.blocks:
            for arena in (block.keys, block.values):
                arena[:, block.length :] = float("nan")
                filled += arena[:, block.length :].numel()
    return filled


def test_padding_is_not_stored() -> None:
    """A batch holds what its sequences hold alone, whatever stands to their left."""
    alone = Case("llama", kv_heads=2, lengths=(30,))
    padded = alone.batch()
    wider = Batch(torch.nn.functional.pad(padded.ids, (17, 0)), torch.nn.functional.pad(padded.mask, (17, 0)))
    held = []
    for batch in (padded, wider):
        with sdk.apply(alone.model(), policy=small_policy("task-kv", 2), ratio=0.5) as handle:
            conversation = Conversation(alone.model(), handle.new_cache())
            conversation.feed(batch)
            held.append((conversation.cache.kept_positions(), handle.report().bytes))
    assert held[0] == held[1]
