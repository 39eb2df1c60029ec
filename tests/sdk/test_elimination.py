"""Elimination of heads: losses against dense float64 attention under the same mask, gradients against differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_models import LAYERS, VOCABULARY, new_model
from thinkkv import sdk
from thinkkv.sdk.elimination import Question, elimination_ranks, rounds
from thinkkv.sdk.hidden_facts import HiddenFact
from thinkkv.sdk.masked_reference import masked_logits
from thinkkv.sdk.policies import RetrievalKV

KV_HEADS = 4
PROMPT = 150
ASKED, ANSWER = 9, 4


def fact(seed: int) -> HiddenFact:
    ids = torch.randint(1, VOCABULARY, (PROMPT + ASKED,), generator=torch.Generator().manual_seed(seed)).tolist()
    return HiddenFact("", tuple(ids[:PROMPT]), tuple(ids[PROMPT:]), ANSWER)


def masked_loss(model: Any, asked: HiddenFact, gates: torch.Tensor) -> float:
    """What the stock model says where closed heads see the sinks and recent tokens of the prompt alone."""
    ends = [*range(RetrievalKV.sinks), *range(PROMPT - RetrievalKV.recent, PROMPT)]
    kept = [[[range(PROMPT) if gate else ends for gate in layer]] for layer in gates.tolist()]
    logits = masked_logits(model, torch.tensor([asked.prompt + asked.asked]), kept, prompt=PROMPT)[0]
    target = torch.tensor(asked.asked[-ANSWER:])
    return float(torch.nn.functional.cross_entropy(logits[-ANSWER - 1 : -1], target))


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3-mixed", "mistral-window"])
@settings(max_examples=6)
@given(closed=st.sets(st.integers(0, LAYERS * KV_HEADS - 1)), seed=st.integers(0, 99))
def test_the_loss_is_that_of_masked_dense_attention(variant: str, closed: set[int], seed: int) -> None:
    model, asked = new_model(variant, KV_HEADS), fact(seed)
    gates = torch.ones(LAYERS * KV_HEADS)
    gates[list(closed)] = 0
    gates = gates.view(LAYERS, KV_HEADS)
    with torch.no_grad(), sdk.apply(model, policy="full") as handle:
        question = Question.read(model, asked, handle.compression)
        found = [float(question.loss(gates)) for _ in range(2)]
    assert found == [pytest.approx(masked_loss(model, asked, gates), rel=1e-4)] * 2


def test_the_worth_is_the_slope_of_the_loss() -> None:
    model = new_model("llama", KV_HEADS).double()
    with sdk.apply(model, policy="full") as handle:
        question = Question.read(model, fact(0), handle.compression)
        gates = torch.rand(LAYERS, KV_HEADS, dtype=torch.float64)
        worth = question.worth(gates.clone())
        for place in range(LAYERS * KV_HEADS):
            step = torch.zeros(LAYERS * KV_HEADS, dtype=torch.float64)
            step[place] = 0.01
            step = step.view(LAYERS, KV_HEADS)
            with torch.no_grad():
                slope = (question.loss(gates - step) - question.loss(gates + step)) / 0.02
            assert float(worth.flatten()[place]) == pytest.approx(float(slope), rel=0.02, abs=2e-5)


@given(st.integers(0, 300))
def test_rounds_close_every_head_and_few_at_once(heads: int) -> None:
    left = heads
    for closing in rounds(heads):
        assert 1 <= closing <= max(1, left / 4)
        left -= closing
    assert left == 0


def test_each_round_closes_the_heads_worth_least_to_all_questions() -> None:
    model, facts = new_model("llama", KV_HEADS), [fact(1), fact(2)]
    ranks = torch.tensor(elimination_ranks(model, facts)) * LAYERS * KV_HEADS
    assert sorted(ranks.flatten().tolist()) == pytest.approx(list(range(1, LAYERS * KV_HEADS + 1)))
    with sdk.apply(model, policy="full") as handle:
        questions = [Question.read(model, each, handle.compression) for each in facts]
        closed = 0
        for closing in rounds(LAYERS * KV_HEADS):
            still = ranks > closed + 0.5
            gates = [still.float(), still / 2]
            worth = sum(question.worth(at.clone()) for question in questions for at in gates)
            going = still & (ranks < closed + closing + 0.5)
            stays = still & ~going
            if stays.any():
                assert worth[going].max() <= worth[stays].min() + 1e-6
            closed += closing


def test_the_model_gets_no_gradients_whatever_surrounds_the_call() -> None:
    model = new_model("qwen3", KV_HEADS).train()
    before = elimination_ranks(model, [fact(3)])
    with torch.inference_mode():
        assert elimination_ranks(model, [fact(3)]) == before
    assert model.training
    assert all(weight.grad is None for weight in model.parameters())


def test_progress_sees_every_round() -> None:
    seen: list[int] = []

    def noting(closing: Any) -> Any:
        for each in closing:
            seen.append(each)
            yield each

    elimination_ranks(new_model("llama", KV_HEADS), [fact(4)], noting)
    assert seen == list(rounds(LAYERS * KV_HEADS))
