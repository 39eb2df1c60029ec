"""Invariant 2 over conversations: prompts, decoding, chunks of several tokens, padded chunks, and cropping."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conformance.cases import Compressed
from tests.conformance.closeness import RMS, assert_close
from tests.conformance.decoding import Conversation, joined, random_chunk, random_tokens
from tests.conformance.small_policies import NAMES, small_policy
from tests.tiny_models import HEAD_DIM, KV_HEADS, VARIANTS, Batch, Case
from thinkkv import sdk
from thinkkv.patches.errors import UnsupportedGenerationError


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Case, list[Batch]]:
    """A case, and what follows its prompt: single tokens and chunks, some of them padded."""
    rows = draw(st.integers(1, 3))
    case = Case(
        draw(st.sampled_from(sorted(VARIANTS))),
        draw(st.sampled_from(KV_HEADS)),
        lengths=tuple(draw(st.lists(st.integers(20, 70), min_size=rows, max_size=rows))),
    )
    following: list[Batch] = []
    for seed in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            following += random_tokens(rows, draw(st.integers(1, 4)), seed=seed)
        else:
            width = draw(st.integers(2, 9))
            lengths = draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows))
            following.append(random_chunk(lengths, width=width, seed=seed))
    return case, following


@given(
    conversation=conversations(),
    policy=st.sampled_from(NAMES),
    ratio=st.sampled_from([0.3, 0.4, 0.6, 0.8, 1.0]),
)
def test_every_turn_sees_what_was_kept_and_all_that_followed(
    conversation: tuple[Case, list[Batch]], policy: str, ratio: float
) -> None:
    case, following = conversation
    check_against_reference(case, policy, ratio, following)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_second_prompt_of_different_lengths(variant: str) -> None:
    """The common case of the law above, with zeros in the middle of the mask, in every family."""
    case = Case(variant, kv_heads=2, lengths=(63, 41, 22))
    following = [*random_tokens(3, 5), random_chunk((17, 3, 11), seed=1), *random_tokens(3, 5, seed=2)]
    check_against_reference(case, "task-kv", 0.4, following)


def check_against_reference(case: Case, policy: str, ratio: float, following: Sequence[Batch]) -> None:
    prompt = case.batch()
    with sdk.apply(case.model(), policy=small_policy(policy, case.kv_heads), ratio=ratio) as handle:
        conversation = Conversation(case.model(), handle.new_cache())
        last = conversation.feed(prompt)[:, -1:]
        compressed = Compressed.of(conversation.cache)
        found = torch.cat([last, conversation.feed_all(following)], dim=1)
        assert handle.report().tokens_seen == joined([prompt, *following]).ids.shape[1]
    whole, columns = joined([prompt, *following]), prompt.ids.shape[1]
    expected = compressed.logits(case, whole, prompt=columns)
    real = whole.mask[:, columns - 1 :].bool()
    assert_close(found[real], expected[real], rms=RMS[case.dtype])


@given(
    variant=st.sampled_from(sorted(VARIANTS)),
    policy=st.sampled_from(NAMES),
    before=st.integers(0, 5),
    forgotten=st.integers(1, 5),
    chunked=st.booleans(),
)
def test_cropped_tokens_leave_no_trace(variant: str, policy: str, before: int, forgotten: int, chunked: bool) -> None:
    case = Case(variant, kv_heads=2, lengths=(63, 30))
    first, second = random_tokens(2, before, seed=1) if before else [], random_tokens(2, 4, seed=2)
    dropped = [random_chunk((forgotten, forgotten), seed=3)] if chunked else random_tokens(2, forgotten, seed=3)
    with sdk.apply(case.model(), policy=small_policy(policy, 2), ratio=0.5) as handle:
        straight = Conversation(case.model(), handle.new_cache())
        straight.feed_all([case.batch(), *first])
        cropped = Conversation(case.model(), handle.new_cache())
        cropped.feed_all([case.batch(), *first, *dropped])
        cropped.crop(forgotten)
        assert cropped.cache.kept_positions() == straight.cache.kept_positions()
        assert handle.report(cropped.cache) == handle.report(straight.cache)
        assert torch.equal(cropped.feed_all(second), straight.feed_all(second))


@pytest.mark.parametrize("decoded", [0, 3])
@pytest.mark.parametrize("variant", ["llama", "qwen2-mixed"])
def test_cropping_into_the_prompt_is_refused_and_changes_nothing(variant: str, decoded: int) -> None:
    case = Case(variant, kv_heads=2, lengths=(63, 30))
    steps = random_tokens(2, decoded) if decoded else []
    with sdk.apply(case.model(), policy=small_policy("task-kv", 2), ratio=0.5) as handle:
        conversation = Conversation(case.model(), handle.new_cache())
        conversation.feed_all([case.batch(), *steps])
        before = handle.report(), conversation.cache.kept_positions()
        with pytest.raises(UnsupportedGenerationError, match="prompt"):
            conversation.crop(decoded + 1)
        assert (handle.report(), conversation.cache.kept_positions()) == before


@pytest.mark.parametrize("variant", ["qwen3", "mistral-window"])
def test_slack_holds_after_many_padded_chunks_and_after_a_long_crop(variant: str) -> None:
    case = Case(variant, kv_heads=2, lengths=(63, 30))
    entry = 2 * HEAD_DIM * case.dtype.itemsize
    rows = len(case.windows) * 2 * 2
    with sdk.apply(case.model(), policy=small_policy("task-kv", 2), ratio=0.4) as handle:
        conversation = Conversation(case.model(), handle.new_cache())
        conversation.feed(case.batch())
        for seed in range(6):
            conversation.feed(random_chunk((100, 90), seed=seed))
            found = handle.report().bytes
            assert found.physical <= 1.15 * found.used + 256 * rows * entry
        if variant == "qwen3":
            conversation.feed(random_chunk((900, 900)))
            conversation.crop(895)
            found = handle.report().bytes
            assert found.physical <= 1.15 * found.used + 256 * rows * entry


def test_two_conversations_on_one_model_do_not_disturb_each_other() -> None:
    case = Case("qwen3", kv_heads=2, lengths=(63, 30))
    other = Case("qwen3", kv_heads=2, lengths=(25, 61))
    steps = random_tokens(2, 6)
    with sdk.apply(case.model(), policy=small_policy("task-kv", 2), ratio=0.5):
        alone = Conversation(case.model()).feed_all([case.batch(), *steps])
        first, second = Conversation(case.model()), Conversation(case.model())
        interleaved = [first.feed(case.batch())]
        second.feed(other.batch())
        for step in steps:
            interleaved.append(first.feed(step))
            second.feed(step)
    assert torch.equal(torch.cat(interleaved, dim=1), alone)
